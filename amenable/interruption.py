"""What Ctrl-C and SIGTERM do: the first asks the run to stop at its next checkpoint, the second stops it at once.

Signals belong to the whole process, so there is one flag for it. Ray takes SIGTERM for itself, in Python and in C++,
while `ray.init` is under way, and would end the command by it; so no thread but one of ours is ever given that signal.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from corpus import logs

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TERM = {signal.SIGTERM}
STOPPING = "Stopping after a checkpoint; once more to stop at once."
TWICE_S = 0.1
"""Seconds within which a second SIGTERM is the first: `timeout` sends it to the command and to its process group."""
_requested = threading.Event()
_said = STOPPING
_waiter: threading.Thread | None = None
"""Waits for SIGTERM, and raises the flag, while one listens."""


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


@contextmanager
def listening(says: str = STOPPING) -> Iterator[None]:
    """Within it SIGINT and SIGTERM ask for a stop, at which a person is told `says`; afterwards they do what they did
    before, and the flag is down.

    To be entered before the process has other threads: those begun within never see SIGTERM, whoever handles it
    meanwhile. Raises ValueError outside the main thread, as Python's signals do.
    """
    global _said
    _said = says
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _requested.clear()
    for number in _SIGNALS:  # SIGTERM too: threads older than this could be given it
        signal.signal(number, _heed)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's jobs begin with it blocked
    try:
        with _waiting_for_term():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _requested.clear()


@contextmanager
def _waiting_for_term() -> Iterator[None]:
    global _waiter
    over = threading.Event()
    waiting = threading.Thread(target=_wait_for_term, args=(over,), name="sigterm", daemon=True)
    waiting.start()
    _waiter = waiting
    try:
        yield
    finally:
        _waiter = None
        over.set()
        assert waiting.ident is not None
        signal.pthread_kill(waiting.ident, signal.SIGTERM)
        waiting.join()


def _wait_for_term(over: threading.Event) -> None:
    while True:
        signal.sigwait(_TERM)
        if over.is_set():
            return
        if _requested.is_set():
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # whose handler raises there
        else:
            _ask()
            signal.sigtimedwait(_TERM, TWICE_S)
            if over.is_set():
                return  # it may have taken what the end sent


def _heed(number: int, frame: FrameType | None) -> None:
    if _requested.is_set():
        raise KeyboardInterrupt
    if _waiter is not None and _waiter.ident is not None:
        # The flag has a lock, which this thread may hold, interrupted in a wait for it: another one raises it.
        signal.pthread_kill(_waiter.ident, signal.SIGTERM)
    else:
        _ask()


def _ask() -> None:
    _requested.set()
    # Whoever is interrupted in the middle of a print holds its lock: write to the descriptor itself.
    said = logs.line(_said, "WARNING") if logs.is_json() else f"\n{_said}"
    with suppress(OSError):  # whoever read it has left
        os.write(2, f"{said}\n".encode())


def _hear_in_child() -> None:
    """A process that Python forks while SIGTERM is waited for must heed it: Ray's daemons are ended by it, and begun
    with a function to run first, for which Python forks. (What `subprocess` begins without one inherits the mask.)"""
    if _waiter is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)


os.register_at_fork(after_in_child=_hear_in_child)
