"""A value in an object store on which all who ask for it agree: made once, it is never another.

pyarrow.fs has no conditional write. This is Disk Paxos (Gafni and Lamport, Distributed Computing 16, 2003) with the
store as its one disk, and with objects that are never changed nor removed in place of each party's block:

- `promised-N-PARTY`, empty: PARTY tries with the ballot (N, PARTY), which is its own alone;
- `accepted-N-PARTY`: the value that it holds up in this ballot;
- `agreed`: the value, once it is settled, for those who come later.

Who asks promises a ballot above all that are listed, and lists again. If its ballot is the highest it accepts the value
of the highest ballot that was accepted, its own where there is none, and lists once more. If its ballot is the highest
still, the value is settled: whoever promises a higher one does so after that listing began, lists later, and so sees
the accepted value and holds it up in turn. Who sees a higher ballot waits for a random time and begins anew.

This needs listings that show all that was written before them, as those of S3 and Google's store do. Clocks and pauses
matter only for how soon it ends; who dies on the way stops nobody.
"""

import random
import re
import time
import uuid
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass

from pyarrow import fs

from corpus.problems import RunProblem
from corpus.storage import one_line, opened, without_options

DEADLINE_S = 60.0
"""Seconds for those who ask at the same time to agree. House default: a round is half a dozen requests."""

AGREED = "agreed"

_BALLOT = re.compile(r"(promised|accepted)-(\d{6,})-([0-9a-f]+)")
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


@dataclass(frozen=True)
class Put:
    """Write this object."""

    name: str
    content: bytes = b""


@dataclass(frozen=True)
class Look:
    """List the names of all objects."""


@dataclass(frozen=True)
class Read:
    """Read this object; b"" where there is none."""

    name: str


@dataclass(frozen=True)
class Pause:
    """Somebody else is at it: wait for a random time."""


Step = Put | Look | Read | Pause


def agree(party: str, proposal: bytes) -> Generator[Step, list[str] | bytes | None, bytes]:
    """What a party (lower-case hex, its own alone) does, step by step; returns the value that is agreed on, which is
    not empty. A Look is answered with names, a Read with bytes."""
    assert proposal, "a value that is empty is none"
    while True:
        settled = yield Read(AGREED)
        if settled:
            assert isinstance(settled, bytes)
            return settled
        number = _highest((yield Look()))[0] + 1
        yield Put(f"promised-{number:06d}-{party}")
        names = yield Look()
        if _highest(names) == (number, party):
            accepted = _highest(names, "accepted")
            value = (yield Read(f"accepted-{accepted[0]:06d}-{accepted[1]}")) if accepted[0] else proposal
            assert isinstance(value, bytes), accepted
            yield Put(f"accepted-{number:06d}-{party}", value)
            if _highest((yield Look())) == (number, party):
                yield Put(AGREED, value)
                return value
        yield Pause()


def _highest(names: list[str] | bytes | None, kind: str = "") -> tuple[int, str]:
    """The highest ballot among the objects, of both kinds or of one; (0, "") where there is none."""
    assert isinstance(names, list), names
    matches = filter(None, map(_BALLOT.fullmatch, names))
    return max(((int(each[2]), each[3]) for each in matches if kind in ("", each[1])), default=(0, ""))


class AgreedValue:
    """The value whose objects lie directly below `address`."""

    def __init__(self, address: str) -> None:
        """Raises UsageProblem where the address cannot be understood."""
        self._address = address
        self._filesystem, self._inner = opened(address)

    def get(self, proposal: bytes, deadline_s: float = DEADLINE_S) -> bytes:
        """The value; `proposal`, which is not empty, where there is none yet and nobody else's comes first.

        Raises RunProblem where the store does not give or take it, or where others are in the way all the time.
        """
        steps, give_up = agree(uuid.uuid4().hex[:12], proposal), time.monotonic() + deadline_s
        pause_s, answer = _SHORTEST_PAUSE_S, None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                if time.monotonic() > give_up:
                    raise RunProblem(
                        f"Waited {deadline_s:g} s for all who start at once to agree on {self._named()}, and others "
                        "were in the way all the time; start again.",
                        "storage/read",
                    )
                time.sleep(random.uniform(0, pause_s))
                pause_s, answer = min(2 * pause_s, _LONGEST_PAUSE_S), None
            else:
                answer = self._done(step)

    def _done(self, step: Put | Look | Read) -> list[str] | bytes | None:
        try:
            if isinstance(step, Look):
                selector = fs.FileSelector(self._inner, allow_not_found=True)
                listed = self._filesystem.get_file_info(selector)
                return [each.base_name for each in listed if each.type == fs.FileType.File]
            if isinstance(step, Read):
                with (
                    suppress(FileNotFoundError),
                    self._filesystem.open_input_stream(f"{self._inner}/{step.name}", compression=None) as stream,
                ):
                    return stream.read()
                return b""
            with self._filesystem.open_output_stream(f"{self._inner}/{step.name}") as stream:
                stream.write(step.content)
            return None
        except OSError as error:
            raise RunProblem(f"{self._named()} cannot be agreed on ({one_line(error)}).", "storage/read") from error

    def _named(self) -> str:
        return without_options(self._address)
