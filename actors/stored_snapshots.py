"""RUN/published of a run that an object store keeps: the same snapshots, for services that share only the store.

A snapshot is `published/<version>/weights.safetensors` and, written last, `manifest.json`, both as the weight store
left them on its disk (actors/published.py). Before anything is committed or removed the run's lease is looked at: of
an attempt that was taken over nothing arrives any more.
"""

import json
from contextlib import suppress
from dataclasses import dataclass

from pyarrow import fs

from actors.episodes import parse_version, version_label
from actors.published import (
    MANIFEST_FILE,
    PUBLISHED,
    STORED_WISHES,
    VERSION_NAME,
    WEIGHTS_FILE,
    PublishedSnapshot,
    pinned_of,
)
from actors.snapshot_files import Version
from corpus.numbered_objects import NumberedObjects
from corpus.run_epoch import RunEpoch
from corpus.storage import below, one_line, opened, send


@dataclass(frozen=True)
class StoredRun:
    """The address of a run in an object store, and for whom its writer writes. Plain, so that it can go to actors."""

    address: str
    epoch: RunEpoch | None
    """None checks nothing: for a run that nobody else can write."""

    def check(self) -> None:
        """Raises RunProblem where the writer may not write any more."""
        if self.epoch is not None:
            self.epoch.check()


class StoredSnapshots:
    """The writer, one a PPO stage: the last `kept` snapshots of the stage whose hash is `identity`.

    Nothing is asked of the store before the first snapshot is saved.
    """

    def __init__(self, run: StoredRun, identity: str, kept: int) -> None:
        self._run, self._identity, self._kept = run, identity, kept
        self._is_tidy = False
        self._saved = 0

    @property
    def saved(self) -> int:
        """How many snapshots this writer has brought to the store."""
        return self._saved

    def save(self, one: PublishedSnapshot) -> None:
        """Send a snapshot that lies on this machine's disk, and remove from the store what is older than the last ones,
        but for one that a service is pinned to. One that is gone from the disk, overtaken by newer ones, is left out.

        Raises OSError where the store refuses, and then leaves no half of it; RunProblem where the run was taken over.
        """
        filesystem, published = opened(below(self._run.address, PUBLISHED))
        self._run.check()
        if not self._is_tidy:
            self._tidy(filesystem, published)
            self._is_tidy = True
        place = f"{published}/{one.label}"
        if not _is_file(filesystem, f"{place}/{MANIFEST_FILE}"):
            manifest = one.weights.parent / MANIFEST_FILE
            if not manifest.exists():
                return
            self._send(filesystem, place, one, manifest.read_bytes())
            self._saved += 1
        self._retire(filesystem, published)

    def _send(self, filesystem: fs.FileSystem, place: str, one: PublishedSnapshot, manifest: bytes) -> None:
        try:
            sent = send(one.weights, filesystem, f"{place}/{WEIGHTS_FILE}")
            arrived = filesystem.get_file_info(f"{place}/{WEIGHTS_FILE}").size
            if not sent == arrived == one.size_bytes:
                raise OSError(f"{WEIGHTS_FILE} arrived with {arrived} bytes, not {one.size_bytes}")
            self._run.check()
            with filesystem.open_output_stream(f"{place}/{MANIFEST_FILE}") as stream:
                stream.write(manifest)
        except OSError:
            with suppress(OSError):
                _remove(filesystem, place)
            raise

    def _tidy(self, filesystem: fs.FileSystem, published: str) -> None:
        """Remove what a writer that died has left half, and snapshots of a stage with another hash."""
        for version in _versions(filesystem, published):
            place = f"{published}/{version_label(*version)}"
            if _identity_of(filesystem, place) != self._identity:
                self._run.check()
                _remove(filesystem, place)

    def _retire(self, filesystem: fs.FileSystem, published: str) -> None:
        versions = _versions(filesystem, published)
        old = versions[: max(0, len(versions) - self._kept)]
        if not old:
            return
        pinned = pinned_of(versions, self._pinned_name())
        self._run.check()
        for version in old:
            if version != pinned:
                _remove(filesystem, f"{published}/{version_label(*version)}")

    def _pinned_name(self) -> str | None:
        _, text = NumberedObjects(below(self._run.address, STORED_WISHES)).newest()
        try:
            name = json.loads(text)["pinned"] if text else None
        except (ValueError, KeyError, TypeError):
            return None
        return name if isinstance(name, str) else None


def told(version: Version, error: Exception) -> str:
    """The warning of a snapshot that did not reach the store."""
    return f"the weights of update {version[1]} did not reach the object store: {one_line(error)}"


def _is_file(filesystem: fs.FileSystem, inner: str) -> bool:
    return filesystem.get_file_info(inner).type == fs.FileType.File


def _identity_of(filesystem: fs.FileSystem, place: str) -> str | None:
    try:
        with filesystem.open_input_stream(f"{place}/{MANIFEST_FILE}", compression=None) as stream:
            return str(json.loads(stream.read())["identity"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _versions(filesystem: fs.FileSystem, published: str) -> list[Version]:
    """Versions of which there is anything, oldest first."""
    listed = filesystem.get_file_info(fs.FileSelector(published, allow_not_found=True))
    return sorted(parse_version(each.base_name) for each in listed if VERSION_NAME.fullmatch(each.base_name))


def _remove(filesystem: fs.FileSystem, place: str) -> None:
    """The manifest first, so that half of it is no snapshot."""
    for name in (MANIFEST_FILE, WEIGHTS_FILE):
        with suppress(FileNotFoundError):
            filesystem.delete_file(f"{place}/{name}")
    with suppress(FileNotFoundError):
        filesystem.delete_dir(place)
