"""Compare-and-set in an object store: every change has one winner, and no reader sees half of one."""

import threading

import pytest

from corpus import numbered_objects
from corpus.numbered_objects import NumberedObjects, Overtaken
from corpus.problems import RunProblem

pytest_plugins = ["tests.object_store"]


@pytest.fixture
def value(store, query):
    """Makes one more party that changes the same value."""
    return lambda: NumberedObjects(f"s3://bucket/runs/one/serving/desired{query}")


def test_a_change_follows_the_one_before_and_only_the_last_object_stays(value, keys_in):
    one, other = value(), value()
    assert one.newest() == (0, b"")
    assert one.put_after(0, b"first") == 1
    assert other.newest() == (1, b"first")
    assert other.put_after(1, b"second") == 2
    assert one.newest() == (2, b"second")
    assert len(keys_in("runs/one/serving/desired/")) == 1


def test_who_has_not_seen_the_last_change_changes_nothing(value, keys_in):
    one, other = value(), value()
    one.put_after(0, b"first")
    for seen in (0, 2):
        with pytest.raises(Overtaken):
            other.put_after(seen, b"late")
    assert (one.newest(), len(keys_in("runs/one/"))) == ((1, b"first"), 1)


def test_who_sees_a_rival_takes_its_own_back_and_tries_again(value, store, monkeypatch, keys_in):
    one, waits = value(), []
    rival = "runs/one/serving/desired/000001-abc123.json"
    real = NumberedObjects._listed
    listings = iter(range(100))

    def listed(self):
        number = next(listings)
        if number == 1:  # the rival's object is listed after ours was written, and taken back before we look again
            store.put_object(Bucket="bucket", Key=rival, Body=b"rival")
        found = real(self)
        if number == 1:
            store.delete_object(Bucket="bucket", Key=rival)
        return found

    monkeypatch.setattr(NumberedObjects, "_listed", listed)
    monkeypatch.setattr(numbered_objects.time, "sleep", waits.append)
    assert one.put_after(0, b"mine") == 1
    assert len(waits) == 1
    assert (value().newest(), len(keys_in("runs/one/"))) == ((1, b"mine"), 1)


def test_who_sees_a_rival_that_stays_is_overtaken(value, store, monkeypatch, keys_in):
    real = NumberedObjects._listed
    listings = iter(range(100))

    def listed(self):
        if next(listings) == 1:
            store.put_object(Bucket="bucket", Key="runs/one/serving/desired/000001-abc123.json", Body=b"rival")
        return real(self)

    monkeypatch.setattr(NumberedObjects, "_listed", listed)
    monkeypatch.setattr(numbered_objects.time, "sleep", lambda _: None)
    with pytest.raises(Overtaken):
        value().put_after(0, b"mine")
    assert (value().newest(), len(keys_in("runs/one/"))) == ((1, b"rival"), 1)


def test_of_many_at_once_exactly_one_is_taken(value):
    parties = [value() for _ in range(6)]
    start, taken = threading.Barrier(len(parties)), []

    def change(number, party):
        start.wait()
        try:
            party.put_after(0, str(number).encode())
        except Overtaken:
            return
        taken.append(number)

    threads = [threading.Thread(target=change, args=each) for each in enumerate(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == 1
    assert value().newest() == (1, str(taken[0]).encode())


def test_what_is_no_such_object_is_left_alone(value, store, keys_in):
    store.put_object(Bucket="bucket", Key="runs/one/serving/desired/README", Body=b"of a person")
    value().put_after(0, b"first")
    assert value().newest() == (1, b"first")
    assert "runs/one/serving/desired/README" in keys_in()


def test_a_store_that_is_away_is_named(query, keys):
    nowhere = NumberedObjects(f"s3://nowhere/value{query}")
    with pytest.raises(RunProblem, match=r"^s3://nowhere/value cannot be written to"):
        nowhere.put_after(0, b"x")


def test_a_change_whose_listing_fails_is_taken_back(value, monkeypatch, keys_in):
    found, listings = NumberedObjects._listed, iter(range(100))

    def listed(self):
        if next(listings) == 1:
            raise OSError("the store went away")
        return found(self)

    with monkeypatch.context() as patch:
        patch.setattr(NumberedObjects, "_listed", listed)
        with pytest.raises(RunProblem, match="the store went away"):
            value().put_after(0, b"mine")
    assert value().newest() == (0, b"")
    assert keys_in("runs/one/") == []
