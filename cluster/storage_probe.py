"""Whether a place does what the commit protocol and the lease of a run ask of it, tried on the spot.

On a disk: exclusive creation, locks (`run.lease`), write with fsync of file and directory, read back, listing, and
replacement by rename (checkpoints, `stage.json`). In an object store: write, read back, a listing that shows what was
just written (the lease rests on that), its time stamp, and removal; there is no rename and no conditional write in
`pyarrow.fs`, and none is asked for. What each node writes the driver must see, and the other way round.
"""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pyarrow import fs

from corpus.problems import UsageProblem
from corpus.storage import is_object_store, one_line, opened

DRIVERS = "driver"
"""The name of the driver's file; a node's file is named for the node."""

NOT_TRIED = "not tried, because what comes before failed"

_SIZE_BYTES = 4096


def probe(place: str, node: str, nonce: str) -> dict[str, str]:
    """Tries every operation at `place` (a directory that is there, or an address), as the node `node`; returns by
    operation what went wrong, an empty text where nothing did. Leaves one file named `node` there, whose content is
    `nonce`."""
    return _tried(_store_operations(place, node, nonce) if is_object_store(place) else _operations(place, node, nonce))


def seen(place: str, name: str, nonce: str) -> str:
    """Whether the file `name`, with `nonce` in it, is at `place` as seen from here: an empty text, or what is there
    instead."""
    try:
        content = _read(place, name)
    except FileNotFoundError:
        return "it is not there"
    except (OSError, UsageProblem) as error:
        return one_line(error)
    return "" if content == nonce.encode() else "its content is another"


def _tried(operations: dict[str, Callable[[], None]]) -> dict[str, str]:
    found: dict[str, str] = {}
    failed = False
    for name, operation in operations.items():
        if failed:
            found[name] = NOT_TRIED
            continue
        try:
            operation()
            found[name] = ""
        except (OSError, UsageProblem, AssertionError) as error:
            found[name], failed = one_line(error) or type(error).__name__, True
    return found


def _operations(place: str, node: str, nonce: str) -> dict[str, Callable[[], None]]:
    directory = Path(place)
    work = directory / f"work-{node}"
    content = nonce.encode() * (_SIZE_BYTES // max(len(nonce), 1) + 1)

    def create() -> None:
        work.mkdir()
        os.close(os.open(work / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with suppress(FileExistsError):
            os.close(os.open(work / "claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            raise OSError("a file was created twice")

    def lock() -> None:
        with open(work / "claim", "a") as first, open(work / "claim", "a") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError("a locked file was locked again: is the file system mounted without locks?")

    def write() -> None:
        with open(work / "written", "wb") as stream:
            stream.write(content)

    def sync() -> None:
        for path in (work / "written", work):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read() -> None:
        if (work / "written").read_bytes() != content:
            raise OSError("what was read is not what was written")

    def rename() -> None:
        with open(work / "claim", "wb") as stream:
            stream.write(b"old")
        os.replace(work / "written", work / "claim")
        if (work / "claim").read_bytes() != content:
            raise OSError("a renamed file is not what it was")

    def listing() -> None:
        if sorted(os.listdir(work)) != ["claim"]:
            raise OSError(f"the listing is {sorted(os.listdir(work))}, not ['claim']")

    def remove() -> None:
        (work / "claim").unlink()
        work.rmdir()
        (directory / node).write_bytes(nonce.encode())

    return {
        "exclusive creation": create,
        "locks": lock,
        "write": write,
        "fsync": sync,
        "read back": read,
        "rename": rename,
        "listing": listing,
        "removal": remove,
    }


def _store_operations(place: str, node: str, nonce: str) -> dict[str, Callable[[], None]]:
    filesystem, inner = opened(place)
    mine = f"{inner}/{node}"

    def write() -> None:
        with filesystem.open_output_stream(mine) as stream:
            stream.write(nonce.encode())

    def read() -> None:
        if _read(place, node) != nonce.encode():
            raise OSError("what was read is not what was written")

    def listing() -> None:
        names = {each.base_name for each in filesystem.get_file_info(fs.FileSelector(inner))}
        if node not in names:
            raise OSError("a listing does not show what was just written; the lease of a run rests on that")

    def stamp() -> None:
        if not filesystem.get_file_info(mine).mtime_ns:
            raise OSError("objects have no time stamp, by which a dead holder of a lease is known")

    def remove() -> None:
        other = f"{inner}/work-{node}"
        with filesystem.open_output_stream(other) as stream:
            stream.write(b"x")
        filesystem.delete_file(other)
        if filesystem.get_file_info(other).type != fs.FileType.NotFound:
            raise OSError("a removed object is still there")

    return {"write": write, "read back": read, "listing": listing, "time stamp": stamp, "removal": remove}


def _read(place: str, name: str) -> bytes:
    if not is_object_store(place):
        return (Path(place) / name).read_bytes()
    filesystem, inner = opened(place)
    with filesystem.open_input_stream(f"{inner}/{name}", compression=None) as stream:
        return stream.read()
