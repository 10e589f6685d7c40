"""A small value in an object store that several change by compare-and-set: numbered objects, the highest counts.

pyarrow.fs has no conditional write, so a change is a new object `NNNNNN-RANDOM.json` with the next number, which never
changes itself. Who has written one lists the objects again: who sees another one of its number, or a later one, takes
its own back, waits for a random time and begins anew. Listings of S3 and Google's store show all that was written
before, so of two that write at once the later one sees the earlier: never do both stay, though both may go back. A
reader that looks in that moment may see a change that is then taken back.
"""

import random
import re
import time
import uuid
from contextlib import suppress

from pyarrow import fs

from corpus.problems import RunProblem
from corpus.storage import one_line, opened, without_options

TRIES = 6
"""Times that a change is tried where others make one at the same moment. House default."""

_NAME = re.compile(r"(\d{6,})-[0-9a-f]+\.json")
_LOOKS = 3
"""Looks for an object that is removed between being listed and being read: a newer one has come."""


class Overtaken(Exception):
    """Somebody else has changed the value since it was looked at."""


class NumberedObjects:
    """The value whose objects lie directly below `address`. What was read is kept: an object never changes."""

    def __init__(self, address: str) -> None:
        """Raises UsageProblem where the address cannot be understood."""
        self._address = address
        self._filesystem, self._inner = opened(address)
        self._read: tuple[str, bytes] = ("", b"")

    def newest(self) -> tuple[int, bytes]:
        """Number and content of the object that counts; (0, b"") before the first. Raises RunProblem where the store
        does not say."""
        try:
            for _ in range(_LOOKS):
                found = self._listed()
                if not found:
                    return 0, b""
                with suppress(FileNotFoundError):
                    return _number(found[-1]), self._content(found[-1].path)
        except OSError as error:
            raise self._problem("cannot be read", error) from error
        raise RunProblem(f"{self._named()} changes too fast to be read; try again.", "storage/read")

    def put_after(self, seen: int, content: bytes) -> int:
        """Makes `content` the value that follows the one numbered `seen`; returns its number.

        Raises Overtaken where there is a later one already, or others change it all the time; RunProblem where the
        store refuses, and then the change may be there or not.
        """
        own = ""
        try:
            for _ in range(TRIES):
                earlier = self._listed()
                if (_number(earlier[-1]) if earlier else 0) != seen:
                    raise Overtaken
                own = f"{self._inner}/{seen + 1:06d}-{uuid.uuid4().hex[:12]}.json"
                with self._filesystem.open_output_stream(own) as stream:
                    stream.write(content)
                if not any(_number(each) > seen and each.path != own for each in self._listed()):
                    for each in earlier:
                        self._delete(each.path)
                    return seen + 1
                self._delete(own)
                time.sleep(random.uniform(0.05, 0.5))
        except OSError as error:
            with suppress(OSError):
                if own:
                    self._delete(own)
            raise self._problem("cannot be written to", error) from error
        raise Overtaken

    def _listed(self) -> list[fs.FileInfo]:
        listed = self._filesystem.get_file_info(fs.FileSelector(self._inner, allow_not_found=True))
        found = [each for each in listed if each.type == fs.FileType.File and _NAME.fullmatch(each.base_name)]
        return sorted(found, key=lambda each: (_number(each), each.base_name))

    def _content(self, path: str) -> bytes:
        if self._read[0] != path:
            with self._filesystem.open_input_stream(path, compression=None) as stream:
                self._read = (path, stream.read())
        return self._read[1]

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):  # someone else has
            self._filesystem.delete_file(path)

    def _named(self) -> str:
        return without_options(self._address)

    def _problem(self, what: str, error: OSError) -> RunProblem:
        return RunProblem(f"{self._named()} {what} ({one_line(error)}).", "storage/read")


def _number(info: fs.FileInfo) -> int:
    match = _NAME.fullmatch(info.base_name)
    assert match is not None, info.base_name
    return int(match[1])
