"""What Ctrl-C and SIGTERM do: the first asks the run to stop at its next checkpoint, the second stops it at once.

Signals belong to the whole process, so there is one flag for it. Ray takes SIGTERM for itself in `ray.init`, and Ray
Train takes SIGINT in `fit`: whoever calls these from the main thread calls `listen` again afterwards.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from corpus import logs

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "Stopping after a checkpoint; once more to stop at once."
_requested = threading.Event()
_said = STOPPING


class Interrupted(Exception):
    """The run stopped because it was asked to, with all it had done safe on the disk.

    Its text says where: "ppo, update 17 of 48".
    """


class LimitReached(Interrupted):
    """The same, because a limit of the recipe was reached. Its text is the whole sentence for a person."""


def requested() -> bool:
    """True once a person or the system has asked the run to stop."""
    return _requested.is_set()


def request() -> None:
    """Asks the run to stop at its next checkpoint, as the first signal does."""
    _requested.set()


def wait(seconds: float) -> bool:
    """Sleeps for `seconds`, or until a stop is asked for; returns whether one is."""
    return _requested.wait(seconds)


def stop_if_requested(where: str) -> None:
    """Raises Interrupted where a stop has been asked for. To be called only when all done so far is on the disk."""
    if requested():
        raise Interrupted(where)


def listen() -> None:
    """Makes SIGINT and SIGTERM ask for a stop. Raises ValueError outside the main thread, as Python's signals do."""
    for number in _SIGNALS:
        signal.signal(number, _heed)


@contextmanager
def listening(says: str = STOPPING) -> Iterator[None]:
    """Within it SIGINT and SIGTERM ask for a stop, at which a person is told `says`; afterwards they do what they did
    before, and the flag is down."""
    global _said
    _said = says
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _requested.clear()
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()


def _heed(number: int, frame: FrameType | None) -> None:
    if _requested.is_set():
        raise KeyboardInterrupt
    _requested.set()
    # A handler may interrupt a print in the middle, and then print would fail: write to the descriptor itself.
    said = logs.line(_said, "WARNING") if logs.is_json() else f"\n{_said}"
    os.write(2, f"{said}\n".encode())
