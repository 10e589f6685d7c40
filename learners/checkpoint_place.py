"""Where checkpoints lie, and which of them are whole: one root, on a local disk or in an object store.

Imports no torch, so that a command can look at a run's checkpoints at once.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pyarrow import fs

from corpus.problems import RunProblem
from corpus.storage import below, fetch, is_object_store, named, one_line, opened, resolve, send
from corpus.stored_directory import StoredDirectory

SCHEMA_VERSION = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
PINNED = "pinned"
"""A file of this name in a checkpoint's directory, put there by a person, spares the checkpoint."""

Root = str | os.PathLike[str]
"""A local directory, or an address such as s3://bucket/runs/name/round-01/ppo/checkpoints."""

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})-(\d+)")


class Damaged(Exception):
    """A checkpoint is not whole; the text says what is wrong with it."""


class Unfinished(Damaged):
    """It never was one: whoever wrote it ended before the manifest."""


class OtherSchema(Damaged):
    """It is of another version of the program, which can read it."""


class CheckpointPlace:
    """The checkpoints below one root. They are known by the names of their directories, `step-SSSSSSSS-N`."""

    def __init__(self, root: Root) -> None:
        """Raises UsageProblem where the address cannot be understood."""
        self.root = root
        self.is_local = not is_object_store(root)
        self._filesystem, self._inner = resolve(root) if self.is_local else opened(str(root))

    def named(self, name: str = "") -> str:
        """What errors and warnings call the root, or the checkpoint `name`: without an address's options."""
        return named(self.root, self._path(name) if name else self._inner)

    def address(self, name: str) -> Path | str:
        """The path or address of the checkpoint `name`."""
        return Path(self._path(name)) if self.is_local else below(self.root, name)

    def names(self) -> list[str]:
        """All that look like checkpoints, whole or not, oldest first. Raises RunProblem where a store does not say."""
        found = self._listed(self._inner)
        return sorted((name for name in found if _NAME.fullmatch(name)), key=key)

    def complete(self) -> list[str]:
        """Those with a manifest, and every file of its size, oldest first."""
        found = []
        for name in self.names():
            with suppress(Damaged):
                self.files(name)
                found.append(name)
        return found

    def fresh(self, step: int) -> str:
        """The name of a new checkpoint of `step`."""
        taken = [key(name)[1] for name in self.names() if key(name)[0] == step]
        return f"step-{step:08d}-{max(taken, default=0) + 1}"

    def files(self, name: str) -> dict[str, str]:
        """SHA-256 (hex) of each file of a checkpoint. Raises Unfinished without a manifest, OtherSchema where another
        version of the program wrote it, Damaged where a size differs."""
        try:
            manifest = json.loads(self._manifest(name))
            if manifest["schema_version"] != SCHEMA_VERSION:
                told = f"its schema version is {manifest['schema_version']}; this program reads {SCHEMA_VERSION}"
                raise OtherSchema(told)
            expected = {file: (each["size_bytes"], each["sha256"]) for file, each in manifest["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged("its manifest is damaged") from None
        if "data.json" not in expected:
            raise Damaged("its manifest is damaged: it names no data.json")
        sizes = self._listed(self._path(name))
        for file, (size_bytes, _) in expected.items():
            if file not in sizes:
                raise Damaged(f"{file} is missing")
            if sizes[file] != size_bytes:
                raise Damaged(f"{file} is damaged: it has {sizes[file]:,} bytes, not {size_bytes:,}")
        return {file: digest for file, (_, digest) in expected.items()}

    def content_of(self, name: str) -> str:
        """SHA-256 (hex) over the names and hashes of a checkpoint's files. Raises what `files` does."""
        return hashlib.sha256(json.dumps(self.files(name), sort_keys=True).encode()).hexdigest()

    def _manifest(self, name: str) -> bytes:
        try:
            with self._filesystem.open_input_stream(self._path(name, MANIFEST), compression=None) as stream:
                text = stream.read()
        except FileNotFoundError:
            text = b""
        except OSError as error:
            if self.is_local:  # a disk may fail to read one file of many; a store that answers nothing says nothing
                raise Damaged(f"{MANIFEST} cannot be read ({one_line(error)})") from error
            raise self._unreachable(error) from error
        if not text:  # opened and not yet written is the same as not there
            raise Unfinished("it has no manifest, so it was never finished")
        return text

    @contextmanager
    def read(self, name: str) -> Iterator[Path]:
        """A local directory with the files of a checkpoint, there within the block. Raises Damaged where one differs
        from the manifest, or this machine's disk does not read it; RunProblem where the store, or a disk for what it
        sends, refuses."""
        files = self.files(name)
        if self.is_local:
            directory = Path(self._path(name))
            for file, digest in files.items():
                try:
                    found = sha256_of(directory / file)
                except OSError as error:
                    raise Damaged(f"{file} cannot be read ({one_line(error)})") from error
                _check(file, digest, found)
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
            directory = Path(temporary)
            for file, digest in files.items():
                try:
                    found = fetch(self._filesystem, self._path(name, file), directory / file)
                except OSError as error:
                    raise self._unreachable(error) from error
                _check(file, digest, found)
            yield directory

    @contextmanager
    def write(self, name: str, may_commit: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """A local directory to write the files of the new checkpoint `name` into; what was written when the block ends
        well becomes one. Otherwise, or where a file does not arrive, nothing is left. Raises OSError, also where
        somebody else has taken the name, and what `may_commit` raises, which is called just before the manifest is
        written, and before anything is removed."""
        with ExitStack() as block:
            if self.is_local:
                directory = Path(self._path(name))
                directory.mkdir(parents=True)  # who fails here removes nothing: the directory is another one's
            else:
                directory = Path(block.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-")))
            try:
                yield directory
                self._commit(name, directory, may_commit)
            except RunProblem:
                raise  # who may not commit removes nothing either: whoever took over may use the name
            except Exception:
                may_commit()
                with suppress(OSError):  # no checkpoint without a manifest, and the space is needed
                    self.remove(name)
                raise

    def _commit(self, name: str, directory: Path, may_commit: Callable[[], None]) -> None:
        files = {}
        for path in sorted(directory.iterdir()):
            if self.is_local:
                _flush(path)
            files[path.name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
            if not self.is_local:
                send(path, self._filesystem, self._path(name, path.name))
        manifest = {"schema_version": SCHEMA_VERSION, "step": key(name)[0], "files": files}
        text = json.dumps(manifest, indent=1).encode()
        if self.is_local:
            _flush(directory)
            may_commit()
            with open(directory / MANIFEST, "wb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            _flush(directory)
            _flush(directory.parent)
            return
        arrived = self._listed(self._path(name))
        for file, each in files.items():
            if arrived.get(file) != each["size_bytes"]:
                raise OSError(f"{file} arrived with {arrived.get(file)} bytes, not {each['size_bytes']}")
        may_commit()
        with self._filesystem.open_output_stream(self._path(name, MANIFEST)) as stream:
            stream.write(text)

    def remove(self, name: str) -> None:
        """Removes a checkpoint, its manifest first, so that half a removal is not one. Raises OSError."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name, MANIFEST))
        with suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path(name))

    def remove_all(self) -> None:
        """Removes every checkpoint but those that a person pinned and those of another version of the program. Raises
        RunProblem where they cannot be removed."""
        try:
            for name in self.names():
                if not self._is_spared(name):
                    self.remove(name)
            if not self.names():
                with suppress(FileNotFoundError):
                    self._filesystem.delete_dir(self._inner)
        except OSError as error:
            raise RunProblem(
                f"{self.named()}: checkpoints could not be removed ({one_line(error)}).", "checkpoint/write"
            ) from error

    def remove_old(
        self, newest: str, keep: int, steps: Collection[int], unreadable: Collection[str] = frozenset()
    ) -> None:
        """Removes what is older than `newest`, which is whole: all but the `keep` newest that are, itself included,
        those of `steps`, those that a person pinned and those of another version of the program. Pinned ones, and those
        that are known to be `unreadable`, whose sizes alone may be right, are not counted. What cannot be removed is
        left, with a warning."""
        try:
            complete = [name for name in self.complete() if name not in unreadable and key(name) <= key(newest)]
            counted = [name for name in complete if not self.is_pinned(name)]
            spared = {newest, *counted[-keep:], *(name for name in complete if key(name)[0] in steps)}
            for name in self.names():
                if name not in spared and key(name) < key(newest) and not self._is_spared(name):
                    self.remove(name)
        except (OSError, RunProblem) as error:
            log.warning("older checkpoints in %s could not be removed: %s", self.named(), one_line(error))

    def is_pinned(self, name: str) -> bool:
        """Whether a person pinned the checkpoint."""
        return self._filesystem.get_file_info(self._path(name, PINNED)).type == fs.FileType.File

    def _is_spared(self, name: str) -> bool:
        """Whether nothing but a person may remove the checkpoint."""
        try:
            self.files(name)
        except OtherSchema:
            return True
        except Damaged:
            pass
        return self.is_pinned(name)

    def _listed(self, inner: str) -> dict[str, int | None]:
        """Sizes in bytes of what is directly below `inner`, by name: None for a directory; nothing where it is not."""
        try:
            found = self._filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        except NotADirectoryError:
            return {}
        except OSError as error:
            raise self._unreachable(error) from error
        return {each.base_name: each.size if each.type == fs.FileType.File else None for each in found}

    def _path(self, *parts: str) -> str:
        return "/".join((self._inner, *parts))

    def _unreachable(self, error: OSError) -> RunProblem:
        # Not the same as no checkpoint: a run that began anew would remove those that are there.
        return RunProblem(
            f"{self.named()}: the checkpoints cannot be read ({one_line(error)}); once they can, the same command "
            "continues.",
            "checkpoint/unreadable",
        )


def checkpoints_of(directory: Path, stored: StoredDirectory | None) -> Root:
    """Where the stage in `directory` has its checkpoints: there, or in the object store that keeps the run."""
    here = directory / CHECKPOINTS
    return here if stored is None else stored.address_of(here)


def key(name: str) -> tuple[int, int]:
    """(step, number) of a checkpoint by its name; the greatest is the newest."""
    _, step, number = name.split("-")
    return int(step), int(number)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(file: str, expected: str, found: str) -> None:
    if found != expected:
        raise Damaged(f"{file} is damaged: its content is not what was written")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
