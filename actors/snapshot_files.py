"""Weight snapshots as files of one directory: the last ones whole, or not there at all.

A file is a safetensors file with one tensor, `buffer`; manifest, version and checksum are JSON in its metadata.
"""

import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from corpus.problems import RunProblem
from models.snapshot import Entry, Snapshot, verify

Version = tuple[int, int]

log = logging.getLogger(__name__)

_NAME = re.compile(r"attempt-(\d+)-update-(\d+)\.safetensors")
_PARTIAL = ".partial"
_LONGEST_HEADER_BYTES = 100 << 20  # as safetensors has it


class SnapshotFiles:
    """The last `kept` snapshots in `directory`."""

    def __init__(self, directory: Path, kept: int) -> None:
        self._directory = directory
        self._kept = kept

    def versions(self) -> list[Version]:
        """The versions there are, oldest first."""
        if not self._directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def save(self, snapshot: Snapshot) -> None:
        """Write `snapshot` and remove what is older than the last ones. Raises OSError, and then leaves what was there.

        Versions only grow within a run, so what is newer than `snapshot` is of another one and goes too.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        write_snapshot(self.path(snapshot.version), snapshot)
        _sync(self._directory)
        older = [version for version in self.versions() if version < snapshot.version]
        for version in {*self.versions()} - {snapshot.version, *older[len(older) - self._kept + 1 :]}:
            self.path(version).unlink()

    def newest(self) -> Snapshot | None:
        """The newest snapshot that is whole; a damaged one is warned of and passed over. None where there is none."""
        for version in reversed(self.versions()):
            try:
                return load_snapshot(self.path(version))
            except (RunProblem, OSError) as problem:
                log.warning("weights on disk are passed over: %s", problem)
        return None

    def remove_partial(self) -> None:
        """Remove what a process that died was writing."""
        for path in self._directory.glob(f"*{_PARTIAL}"):
            path.unlink()

    def path(self, version: Version) -> Path:
        """The file of `version`, whether it is there or not."""
        attempt, update = version
        return self._directory / f"attempt-{attempt}-update-{update:06d}.safetensors"


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Make `snapshot` appear at `path` whole or not at all. Raises OSError."""
    partial = path.with_suffix(_PARTIAL)
    try:
        with partial.open("wb") as file:
            _write_into(file, snapshot)
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # so that a full disk has room again
        raise


@contextmanager
def in_shared_memory(snapshot: Snapshot) -> Iterator[Path]:
    """A path at which other processes of this user on this machine can `map_snapshot` while the block lasts.

    It leads to memory that has no name in any directory (memfd), so that nothing of it is left where this process is
    killed. What was mapped stays readable after the block. Raises OSError where there is no memory for it.
    """
    with os.fdopen(os.memfd_create("amenable-weights"), "wb") as file:
        _write_into(file, snapshot)
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _write_into(file: BinaryIO, snapshot: Snapshot) -> None:
    header = _header(snapshot)
    file.write(struct.pack("<Q", len(header)) + header)
    file.write(snapshot.buffer.data)
    file.flush()


def _header(snapshot: Snapshot) -> bytes:
    size_bytes = snapshot.buffer.nbytes
    described = {"version": snapshot.version, "manifest": snapshot.manifest, "checksum": snapshot.checksum}
    header = {
        "__metadata__": {name: json.dumps(value) for name, value in described.items()},
        "buffer": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]},
    }
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def load_snapshot(path: Path) -> Snapshot:
    """The snapshot in the file at `path`. Raises RunProblem where it is none or is damaged, OSError where it cannot be
    read."""
    snapshot = map_snapshot(path)
    verify(snapshot)
    return Snapshot(snapshot.version, np.array(snapshot.buffer), snapshot.manifest, snapshot.checksum)


def map_snapshot(path: Path) -> Snapshot:
    """The snapshot in a file whose bytes were checked already; its buffer is the file itself, read as it is needed.

    Raises RunProblem where it is no snapshot, OSError where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        metadata = {name: json.loads(text) for name, text in header["__metadata__"].items()}
        start, end = header["buffer"]["data_offsets"]
        buffer = np.memmap(path, np.uint8, "r", offset=8 + length + start, shape=(end - start,))
        manifest = [Entry(name, tuple(shape), dtype, offset) for name, shape, dtype, offset in metadata["manifest"]]
        attempt, update = metadata["version"]
        return Snapshot((attempt, update), buffer, manifest, metadata["checksum"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunProblem(f"{path} is no weight snapshot ({error}).", "publication/damaged") from error


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
