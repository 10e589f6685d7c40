"""RUN/published: immutable snapshots of the policy, for whoever shares the run's directory and not its Ray cluster.

A snapshot is a directory named by its version, `<attempt>.<update>`, with `weights.safetensors` (a weight snapshot as
`actors.snapshot_files` has them) and `manifest.json`, which is written last: without it there is no snapshot. What is
older than the last ones goes, the manifest first; what somebody has pinned stays.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from actors.episodes import parse_version, version_label
from actors.snapshot_files import Version, load_snapshot, write_snapshot
from corpus.problems import RunProblem
from models.snapshot import Snapshot

SCHEMA_VERSION = 1
PUBLISHED = "published"
"""Directory of the snapshots, in the run's own."""
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

DESIRED_FILE = Path("serving", "desired.json")
"""What a service of the run should serve as `policy`, in the run's directory; serving/desired.py writes it."""

STORED_WISHES = "serving/desired"
"""The same in an object store: the directory of numbered objects with the same content (corpus/numbered_objects.py)."""

PINNED_NAME = re.compile(r"policy@(?:(0|[1-9]\d{0,8})\.)?(0|[1-9]\d{0,8})")
"""A model name that means one version: policy@UPDATE, or policy@ATTEMPT.UPDATE."""

VERSION_NAME = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})")
"""The name of a snapshot's directory."""
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PublishedSnapshot:
    """A snapshot that is whole: its version (attempt, update), its weights' file with size and sha256, and the hash of
    the stage that made it."""

    version: Version
    weights: Path
    size_bytes: int
    sha256: str
    identity: str

    @property
    def label(self) -> str:
        """The version as engines and people call it."""
        return version_label(*self.version)

    def load(self) -> Snapshot:
        """The weights. Raises RunProblem where they are not the ones that were published, or are gone."""
        self.check()
        try:
            return load_snapshot(self.weights)
        except OSError as error:
            raise RunProblem(f"{self.weights} cannot be read ({error}).", "publication/damaged") from error

    def check(self) -> None:
        """Raises RunProblem where the file's bytes are not those that the manifest tells of."""
        try:
            with open(self.weights, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise RunProblem(f"{self.weights} cannot be read ({error}).", "publication/damaged") from error
        if found != self.sha256:
            raise RunProblem(
                f"{self.weights} is damaged: it is not the file that its manifest tells of.", "publication/damaged"
            )


def published(directory: Path) -> list[PublishedSnapshot]:
    """The snapshots in `directory`, oldest first; an attempt is newer than all before it. What has no readable manifest
    is left out."""
    found = []
    for version in _versions(directory):
        one = read_published(directory, version)
        if one is not None:
            found.append(one)
    return found


def read_published(directory: Path, version: Version) -> PublishedSnapshot | None:
    """The snapshot of `version`; None where there is none that is whole."""
    place = directory / version_label(*version)
    try:
        says = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))
        if says["schema_version"] != SCHEMA_VERSION or tuple(says["version"]) != tuple(version):
            return None
        file = says["files"][WEIGHTS_FILE]
        return PublishedSnapshot(
            version, place / WEIGHTS_FILE, int(file["size_bytes"]), str(file["sha256"]), str(says["identity"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pinned_of(versions: Collection[Version], name: str | None) -> Version | None:
    """The one of `versions` that a name such as policy@12 or policy@1.12 means, the newest attempt's where it names
    none; None where there is none."""
    match = PINNED_NAME.fullmatch(name) if name is not None else None
    if match is None:
        return None
    attempt, update = match[1], int(match[2])
    meant = [one for one in versions if one[1] == update and (attempt is None or one[0] == int(attempt))]
    return max(meant, default=None)


class PublishedFiles:
    """The writer, one a PPO stage: the last `kept` snapshots of the stage whose hash is `identity`."""

    def __init__(self, directory: Path, identity: str, kept: int) -> None:
        """Removes what a writer that died has left half, and snapshots of a stage with another hash: they are of other
        settings or data."""
        self._directory, self._identity, self._kept = directory, identity, kept
        if directory.is_dir():
            whole = {one.label for one in published(directory) if one.identity == identity}
            for place in directory.iterdir():
                if place.name not in whole and (VERSION_NAME.fullmatch(place.name) or place.name.endswith(_PARTIAL)):
                    _remove(place)

    def save(self, snapshot: Snapshot, file: Path | None = None) -> None:
        """Publish `snapshot`, which may lie in `file` on the same disk already, and remove what is older than the last
        ones, but for one that a service is pinned to. Raises OSError, and then leaves no half of it."""
        place = self._directory / version_label(*snapshot.version)
        if (place / MANIFEST_FILE).exists():
            return
        _remove(place)
        place.mkdir(parents=True)
        weights = place / WEIGHTS_FILE
        try:
            _put(snapshot, file, weights)
            with open(weights, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            says = {
                "schema_version": SCHEMA_VERSION,
                "version": list(snapshot.version),
                "identity": self._identity,
                "published": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": {WEIGHTS_FILE: {"size_bytes": weights.stat().st_size, "sha256": digest}},
            }
            _write_whole(place / MANIFEST_FILE, json.dumps(says, indent=2) + "\n")
        except OSError:
            _remove(place)
            raise
        self._retire()

    def _retire(self) -> None:
        versions = _versions(self._directory)
        pinned = pinned_of(versions, _pinned_name(self._directory.parent))
        for version in versions[: max(0, len(versions) - self._kept)]:
            if version != pinned:
                _remove(self._directory / version_label(*version))


def _pinned_name(run: Path) -> str | None:
    try:
        name = json.loads((run / DESIRED_FILE).read_text(encoding="utf-8"))["pinned"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _put(snapshot: Snapshot, file: Path | None, weights: Path) -> None:
    if file is not None:
        try:
            os.link(file, weights)
            return
        except OSError:  # a file system without links, or the file has been overtaken and is gone
            pass
    write_snapshot(weights, snapshot)


def _versions(directory: Path) -> list[Version]:
    if not directory.is_dir():
        return []
    return sorted(parse_version(place.name) for place in directory.iterdir() if VERSION_NAME.fullmatch(place.name))


def _remove(place: Path) -> None:
    """The manifest first, so that half of it is no snapshot."""
    (place / MANIFEST_FILE).unlink(missing_ok=True)
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(_PARTIAL)
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
