"""The thread that does the newest thing alone."""

import logging
import threading
import time

from actors.newest_only import NewestOnly

DEADLINE_S = 30


def settled(thread: NewestOnly) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while thread.is_busy:
        assert time.monotonic() < give_up, "it is still busy"
        time.sleep(0.005)


def test_who_gives_does_not_wait_and_what_is_overtaken_is_left_out():
    gate, begun, done = threading.Event(), threading.Event(), []

    def handle(item: int) -> None:
        begun.set()
        assert gate.wait(DEADLINE_S)
        done.append(item)

    thread = NewestOnly("test", handle, lambda item, error: f"{item}: {error}")
    thread.give(0)
    assert begun.wait(DEADLINE_S)
    for item in range(1, 5):
        thread.give(item)
    assert (thread.is_busy, done) == (True, [])
    gate.set()
    settled(thread)
    assert (done, thread.failed, thread.problem) == ([0, 4], 0, None)


def test_what_fails_is_counted_and_warned_of_and_the_next_one_is_tried(caplog):
    def handle(item: int) -> None:
        if item < 2:
            raise OSError("it is full")

    thread = NewestOnly("test", handle, lambda item, error: f"item {item}: {error}")
    with caplog.at_level(logging.WARNING):
        for item in range(2):
            thread.give(item)
            settled(thread)
            assert thread.problem == f"item {item}: it is full"
    assert [record.getMessage() for record in caplog.records] == ["item 0: it is full", "item 1: it is full"]
    thread.give(2)
    settled(thread)
    assert (thread.failed, thread.problem) == (2, None)
