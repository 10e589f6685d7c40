"""Calls that are waited for with a deadline and an ear for a stop."""

import threading

import pytest

from cluster.patience import call_within


@pytest.fixture
def never():
    """A call that does not end before the test has."""
    over = threading.Event()
    yield lambda: over.wait(30)
    over.set()


def test_a_call_that_ends_returns_nothing_and_one_that_fails_its_failure():
    problem = ValueError("as the call says")

    def fail() -> None:
        raise problem

    assert call_within(10, lambda: 7, lambda: None) is None
    assert call_within(10, fail, lambda: None) is problem


def test_one_that_does_not_end_is_given_up(never):
    with pytest.raises(TimeoutError):
        call_within(0.3, never, lambda: None)


def test_what_is_raised_meanwhile_ends_the_wait(never):
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        call_within(10, never, stop)
