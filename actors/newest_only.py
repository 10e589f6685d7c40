"""A thread that does something slow with the newest of what it is given, so that nobody waits for it."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

log = logging.getLogger(__name__)


class NewestOnly(Generic[Item]):
    """Calls `handle` with one item at a time, in a thread that is there while there is something to do. One that waits
    is dropped when a newer one comes. What `handle` raises is counted, warned of and kept in `problem`."""

    def __init__(self, name: str, handle: Callable[[Item], None], told: Callable[[Item, Exception], str]) -> None:
        """`name` is the thread's; `told` makes a sentence of what went wrong with an item."""
        self._name, self._handle, self._told = name, handle, told
        self._lock = threading.Lock()
        self._next: Item | None = None
        self._is_busy = False
        self._problem: str | None = None
        self._failed = 0

    def give(self, item: Item) -> None:
        """Hand over an item; returns at once."""
        with self._lock:
            self._next = item
            if not self._is_busy:
                self._is_busy = True
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        """Whether an item is being handled or waits."""
        with self._lock:
            return self._is_busy

    @property
    def problem(self) -> str | None:
        """Why the last item could not be handled; None where it could."""
        with self._lock:
            return self._problem

    @property
    def failed(self) -> int:
        """How many items could not be handled so far."""
        with self._lock:
            return self._failed

    def _work(self) -> None:
        while True:
            with self._lock:
                item, self._next = self._next, None
                if item is None:
                    self._is_busy = False
                    return
            problem = None
            try:
                self._handle(item)
            except Exception as error:  # noqa: BLE001 - told of and counted; whoever handed it over does not wait
                problem = self._told(item, error)
                log.warning(problem)
            with self._lock:
                self._problem = problem
                self._failed += problem is not None
            del item  # else it stays until the next one comes
