"""What a service reads of a run that an object store keeps, as files of this machine.

A mirror is a directory that looks like the run's own: recipe, records of stages that are done, tokenizers and
configurations of their models, manifests of published snapshots, curves. Weights come when they are asked for
(`Mirror.fetch`), are held against the sha256 that a stage's record or a manifest tells, and have their name only then.
Who reads them checks them again (`Weights.check`): a file that this machine's disk has damaged is fetched anew.
The replicas of a machine share one mirror: locks in its directory keep them from fetching anything twice.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from actors.published import MANIFEST_FILE, PUBLISHED, VERSION_NAME
from corpus.file_lock import file_lock
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import fetch, one_line, opened, send, without_options
from serving.names import ROUND
from serving.stored_sessions import ENDED

STAGES_S = 5.0
"""Seconds between two looks for stages that are done meanwhile, for curves, and for what people have kept. Published
weights are looked for at every look. House default: each look at stages asks the store for a dozen objects."""

LOOK_DEADLINE_S = 300.0
"""Seconds for another process of this machine to end its look. House default."""

FETCH_DEADLINE_S = 3600.0
"""Seconds for another process of this machine to fetch one file of weights. House default."""

RECORD = "stage.json"
CURVES = "metrics.jsonl"
WEIGHTS = ".safetensors"

_STAGES: dict[str, tuple[str, ...]] = {
    "data": ("tokenizer/", "base-with-pad/", "prompts-heldout.parquet"),
    "base": ("export/",),
    "sft": ("epoch-",),
}
_STAGES_OF_A_ROUND: dict[str, tuple[str, ...]] = {
    "select-sft": ("selection.json",),
    "ppo-init": ("export/",),
    "rm": ("export/",),
    "ppo": ("policy/", "ema/"),
}
"""Stages and what a service reads of them, by the beginnings of paths."""

_DRAWN = ("sft", "rm", "ppo")
"""Stages whose curves the page shows."""

_KEPT_COMPARISONS = "serving/comparisons"
_ENDED_SESSION = re.compile(r"([0-9a-f]{32})-(\d{1,12})")
_ARRIVING = ".partial"
_OWN = ".mirror"
"""Directory of the mirror's own files: times of looks, and the directories of locks and of digests of what came."""

_DIGESTS, _LOCKS = "digests", "locks"


class Mirror:
    """The mirror of the run at `address` in the directory `root`. Its calls wait for the store and for locks."""

    def __init__(self, address: str, root: Path) -> None:
        """Raises UsageProblem where the address cannot be understood."""
        self.root = root
        self._address = address
        self._filesystem, self._inner = opened(address)
        self._seen: dict[str, tuple[int, int]] = {}
        """Bytes and time of objects as this process last fetched them."""

    def look(self, published_s: float, stages_s: float) -> None:
        """Makes the mirror as the store is, but for weights; what a process of this machine did within `published_s`
        and `stages_s` is not done again.

        Raises RunProblem where the store does not answer or the disk takes no more; what is here stays then.
        """
        try:
            with self._locked("look", "to look at the store", LOOK_DEADLINE_S):
                if self._is_due("published", published_s):
                    self._look_at_published()
                    self._done("published")
                if self._is_due("stages", stages_s):
                    self._done("stages")  # before it is: a file that is damaged is not fetched at every look
                    self._look_at_stages()
        except OSError as error:
            raise self._problem(error) from error

    def fetch(self, path: Path, sha256: str, damaged: bool = False) -> None:
        """Has the file `path`, which lies in the mirror, be there with this digest (hex). It is taken for what it was
        when it came; `damaged` says that it was found to be another, and that its bytes are to be looked at.

        Raises RunProblem where what the store sends is another, or it does not answer, or the disk takes no more.
        """
        name = path.relative_to(self.root).as_posix()
        self._place(name)
        try:
            if self._digest(name) == sha256 and not damaged:
                return
            with self._locked(name, f"to fetch {name}", FETCH_DEADLINE_S):
                if damaged and not _is_whole(path, sha256):  # it is, where another process has fetched it meanwhile
                    self._forget(name)
                if self._digest(name) != sha256:
                    self._bring(name, sha256)
        except OSError as error:
            self._undone("published")  # it may have been removed meanwhile: the next look sees what is there instead
            raise self._problem(error) from error

    def send(self, path: Path) -> None:
        """Brings a file that was made in the mirror to the store. Raises RunProblem where it refuses."""
        try:
            send(path, self._filesystem, self._at(path.relative_to(self.root).as_posix()))
        except OSError as error:
            raise self._problem(error) from error

    # looks -----------------------------------------------------------------------------------------------------------

    def _look_at_published(self) -> None:
        """Manifests as they are in the store. One that is gone there goes with its weights, itself first."""
        listed = self._listed(PUBLISHED, True)
        manifests = {
            version: stat
            for path, stat in listed.items()
            for version, _, name in [path.partition("/")]
            if name == MANIFEST_FILE and VERSION_NAME.fullmatch(version)
        }
        here = self.root / PUBLISHED
        for place in list(here.iterdir()) if here.is_dir() else []:
            if place.name not in manifests:
                self._forget(f"{PUBLISHED}/{place.name}/{MANIFEST_FILE}")
                own = [self.root / _OWN / kind / PUBLISHED / place.name for kind in (_DIGESTS, _LOCKS)]
                for each in (place, *own):
                    shutil.rmtree(each, ignore_errors=True)
        for version, stat in manifests.items():
            self._follow(f"{PUBLISHED}/{version}/{MANIFEST_FILE}", stat)

    def _look_at_stages(self) -> None:
        self._look_at_ended_sessions()  # first: whatever else is damaged, a session that was ended is over
        rounds = sorted(name for name in self._directories() if ROUND.fullmatch(name))
        newest = rounds[-1] if rounds else "round-01"
        stages = _STAGES | {f"{newest}/{stage}": paths for stage, paths in _STAGES_OF_A_ROUND.items()}
        curves = [f"{stage}/{CURVES}" for stage in stages if stage.rpartition("/")[2] in _DRAWN]
        plain = ["recipe.yaml", *curves]
        records = {f"{stage}/{RECORD}": stage for stage in stages}
        for info in self._filesystem.get_file_info([self._at(name) for name in [*plain, *records]]):
            name = info.path.removeprefix(f"{self._inner}/")
            stat = _stat(info) if info.type == fs.FileType.File else None
            if name in records:
                self._follow_stage(records[name], stat, stages[records[name]])
            else:
                self._follow(name, stat)
        self._look_at_comparisons()

    def _look_at_comparisons(self) -> None:
        """What people have kept on the page; what came from the store and is gone there goes."""
        listed = {f"{_KEPT_COMPARISONS}/{name}": stat for name, stat in self._listed(_KEPT_COMPARISONS, False).items()}
        for path in (self.root / _KEPT_COMPARISONS).glob("*.json"):
            name = path.relative_to(self.root).as_posix()
            if name not in listed and self._digest(name) is not None:
                self._forget(name)
        for name, stat in listed.items():
            self._follow(name, stat)

    def _look_at_ended_sessions(self) -> None:
        """Sessions that were ended on other machines are added to the file that `Access` reads; objects of those that
        would be over are removed."""
        file = self.root / ENDED
        known = file.read_text(encoding="utf-8") if file.exists() else ""
        for name in self._listed(ENDED, False):
            match = _ENDED_SESSION.fullmatch(name)
            if match is None:
                continue
            if int(match[2]) < time.time():
                with suppress(FileNotFoundError):  # another machine has
                    self._filesystem.delete_file(self._at(f"{ENDED}/{name}"))
            elif match[1] not in known:
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "a", encoding="utf-8") as stream:
                    stream.write(f"{match[1]} {match[2]}\n")

    def _follow(self, name: str, stat: tuple[int, int] | None) -> None:
        """The file as the object is; None is no object."""
        if stat is None:
            self._forget(name)
        elif self._seen.get(name) != stat or not (self.root / name).exists():
            self._bring(name)
            self._seen[name] = stat

    def _follow_stage(self, stage: str, stat: tuple[int, int] | None, wanted: tuple[str, ...]) -> None:
        """The stage's record as the store has it, after the files that it names and a service reads, weights excepted;
        before any of them changes, the record is gone here."""
        name = f"{stage}/{RECORD}"
        if stat is None:
            self._forget(name)
            return
        if self._seen.get(name) == stat and (self.root / name).exists():
            return
        with self._filesystem.open_input_stream(self._at(name), compression=None) as stream:
            text = stream.read()
        files = _files_of(text, f"{without_options(self._address)}/{name}")
        digests = {f"{stage}/{path}": digest for path, digest in files.items() if path.startswith(wanted)}
        for path in digests:
            self._place(path)
        if (self.root / name).exists() and (self.root / name).read_bytes() != text:
            self._forget(name)
        for path in self._strange(stage, wanted, {*digests}):
            self._forget(path)
        for path, digest in digests.items():
            if not path.endswith(WEIGHTS) and self._digest(path) != digest:
                self._bring(path, digest)
        _write_whole(self._place(name), text)
        self._seen[name] = stat

    def _strange(self, stage: str, wanted: tuple[str, ...], named: set[str]) -> list[str]:
        """Files of a former record of the stage, which the present one does not name."""
        below = [path for path in (self.root / stage).rglob("*") if path.is_file()]
        # What is arriving belongs to whoever fetches it, perhaps another process.
        names = [path.relative_to(self.root).as_posix() for path in below if path.suffix != _ARRIVING]
        return [name for name in names if name.removeprefix(f"{stage}/").startswith(wanted) and name not in named]

    # files -----------------------------------------------------------------------------------------------------------

    def _bring(self, name: str, sha256: str | None = None) -> None:
        """Fetches a file and gives it its name once it is whole, and of this digest."""
        path = self._place(name)
        arriving = path.with_name(f"{path.name}{_ARRIVING}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = fetch(self._filesystem, self._at(name), arriving)
            if sha256 is not None and found != sha256:
                place = f"{without_options(self._address)}/{name}"
                raise RunProblem(
                    f"{place} is damaged: it is not the file that its record or manifest tells of.", "serving/mirror"
                )
            note = self._note(name)
            note.unlink(missing_ok=True)
            with open(arriving, "rb") as whole:
                os.fsync(whole.fileno())  # before its note says that it is whole
            arriving.replace(path)
            _write_whole(note, f"{path.stat().st_size} {found}".encode())
        finally:
            arriving.unlink(missing_ok=True)

    def _digest(self, name: str) -> str | None:
        """SHA-256 of the file as it was fetched; None where it is not here, or not as long as it was then."""
        try:
            size, digest = self._note(name).read_text(encoding="utf-8").split(" ")
            return digest if (self.root / name).stat().st_size == int(size) else None
        except (OSError, ValueError):
            return None

    def _forget(self, name: str) -> None:
        self._seen.pop(name, None)
        for path in (self._place(name), self._note(name)):
            path.unlink(missing_ok=True)

    def _place(self, name: str) -> Path:
        """Where the object `name` of the run is in the mirror. Raises RunProblem for a name that leads out of it."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/"):
            raise RunProblem(
                f"{without_options(self._address)} names a file {name!r}, which is no file of a run.", "serving/mirror"
            )
        return self.root.joinpath(*parts)

    def _note(self, name: str) -> Path:
        """The file with size and digest of another."""
        return self.root / _OWN / _DIGESTS / f"{name}.sha256"

    def _at(self, name: str) -> str:
        return f"{self._inner}/{name}"

    # the store -------------------------------------------------------------------------------------------------------

    def _listed(self, below: str, recursive: bool) -> dict[str, tuple[int, int]]:
        """Bytes and time of the objects below a directory, by their paths there."""
        inner = self._at(below)
        found = self._filesystem.get_file_info(fs.FileSelector(inner, recursive=recursive, allow_not_found=True))
        return {each.path[len(inner) + 1 :]: _stat(each) for each in found if each.type == fs.FileType.File}

    def _directories(self) -> list[str]:
        found = self._filesystem.get_file_info(fs.FileSelector(self._inner, allow_not_found=True))
        return [each.base_name for each in found if each.type == fs.FileType.Directory]

    def _problem(self, error: OSError) -> RunProblem:
        place = without_options(self._address)
        return RunProblem(f"{place} could not be brought to {self.root} ({one_line(error)}).", "serving/mirror")

    # this machine ----------------------------------------------------------------------------------------------------

    def _is_due(self, what: str, every_s: float) -> bool:
        try:
            return not 0 <= time.time() - (self.root / _OWN / f"{what}.looked").stat().st_mtime < every_s
        except FileNotFoundError:
            return True

    def _done(self, what: str) -> None:
        (self.root / _OWN / f"{what}.looked").touch()

    def _undone(self, what: str) -> None:
        (self.root / _OWN / f"{what}.looked").unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str, what: str, deadline_s: float) -> Iterator[None]:
        """A lock that processes of this machine share. Raises RunProblem where it is not free in time."""
        place = self.root / _OWN / _LOCKS / f"{name}.lock"
        place.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(file_lock(place, deadline_s))
            except UsageProblem as late:
                raise RunProblem(
                    f"Waited {deadline_s:.0f} s for another process {what} into {self.root} and gave up. {late}",
                    "serving/mirror",
                ) from late
            yield


def _files_of(text: bytes, where: str) -> dict[str, str]:
    """SHA-256 of the files in a stage's record, by path. Raises RunProblem where it is none."""
    try:
        return {str(path): str(each["sha256"]) for path, each in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunProblem(f"{where} cannot be read as the record of a stage.", "serving/mirror") from None


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether the file's bytes have this digest (hex); not, where it is not there or cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _stat(info: Any) -> tuple[int, int]:
    return info.size or 0, info.mtime_ns or 0


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
