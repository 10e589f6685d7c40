"""What is wanted of a run in an object store, what replicas say, the secret of its sessions: one for all machines."""

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from corpus import agreed_value
from corpus.problems import RunProblem, UsageProblem
from serving import desired
from serving.access import Access, new_token
from serving.desired import Wish, WishOvertaken, read_reports, read_wish, remove_report, write_report, write_wish
from serving.page.backend import SESSION_COOKIE
from serving.stored_sessions import SECRET_BYTES, StoredSessions
from tests.serving.stored_run import objects

pytest_plugins = ["tests.object_store"]


@pytest.fixture
def address(store, query):
    return f"s3://bucket/runs/one{query}"


def test_a_wish_is_counted_and_says_who_wanted_it(address):
    assert read_wish(address) == Wish()
    first = write_wish(address, "policy@12", 0, "ada", "now")
    assert (first, read_wish(address)) == (Wish(1, "policy@12", "ada", "now"), first)
    assert write_wish(address, None, 1, "bob", "later").counter == 2
    with pytest.raises(WishOvertaken, match="bob has asked for the newest weights at later"):
        write_wish(address, "policy@1", 1, "cyd", "too late")
    with pytest.raises(UsageProblem, match="names no version"):
        write_wish(address, "sft", 2, "ada", "now")


def test_of_two_at_once_exactly_one_is_taken_and_the_other_is_told(address):
    start, taken, told = threading.Barrier(2), [], []

    def try_to(who: str) -> None:
        start.wait()
        try:
            taken.append(write_wish(address, "policy@1", 0, who, "now"))
        except WishOvertaken as overtaken:
            told.append(str(overtaken))

    threads = [threading.Thread(target=try_to, args=(who,)) for who in ("ada", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    [winner] = taken
    assert read_wish(address) == winner
    assert told == [f"{winner.who} has asked for policy@1 at now, since you looked; look again."]


@pytest.mark.parametrize(
    "content", ["{", '{"schema_version": 2}', '{"schema_version": 1, "counter": 1, "pinned": "/"}']
)
def test_a_damaged_wish_is_told_of(address, store, content):
    store.put_object(Bucket="bucket", Key="runs/one/serving/desired/000001-abc.json", Body=content.encode())
    with pytest.raises(RunProblem, match=r"^s3://bucket/runs/one/serving/desired cannot be read"):
        read_wish(address)


def test_replicas_report_until_they_end_or_fall_silent(address, monkeypatch):
    write_report(address, "host-1", {"slots": []})
    write_report(address, "host-2", {"slots": []})
    remove_report(address, "host-2")
    remove_report(address, "host-3")
    assert read_reports(address) == {"host-1": {"slots": []}}
    with pytest.raises(ValueError, match="no id"):
        write_report(address, "../x", {})
    monkeypatch.setattr(desired, "REPORT_STALE_S", -60.0)
    assert read_reports(address) == {}


def test_a_store_that_is_away_is_named(query, keys):
    with pytest.raises(RunProblem, match=r"^s3://nowhere/run/serving/desired cannot be written to"):
        write_wish(f"s3://nowhere/run{query}", None, 0, "ada", "now")


def test_a_session_opens_on_every_machine_and_log_out_is_told_to_all(address, store, tmp_path):
    token = new_token(tmp_path / "tokens.json", "ada", frozenset({"read"}))
    machines = [Access(tmp_path / name, tmp_path / "tokens.json", StoredSessions(address)) for name in ("one", "other")]
    session = machines[0].log_in(token)
    assert session is not None
    headers = {"cookie": f"{SESSION_COOKIE}={session.cookie}"}
    assert [each.visitor(headers) is not None for each in machines] == [True, True]
    machines[0].log_out(session.cookie)
    assert machines[0].visitor(headers) is None
    [ended] = objects(store, "runs/one/serving/ended-sessions/")
    assert ended.startswith(session.cookie.split(".")[2])
    elsewhere = Access(tmp_path / "elsewhere", tmp_path / "tokens.json", StoredSessions(address.replace("one", "two")))
    assert elsewhere.visitor(headers) is None  # another run's secret


def test_a_secret_that_is_none_is_told_of(address, store):
    store.put_object(Bucket="bucket", Key="runs/one/serving/session-key/agreed", Body=b"xyz")
    with pytest.raises(RunProblem, match="is not the secret of a run's sessions"):
        _ = StoredSessions(address).secret


class Turns:
    """Lets replicas touch a store one at a time, in an order drawn from a seed. What each does is a thread of its own,
    which waits for its turn before every call of the file system."""

    def __init__(self, seed: int, filesystem: fs.FileSystem) -> None:
        self._chance, self._filesystem = random.Random(seed), filesystem
        self._changed = threading.Condition()
        self._waiting: set[str] = set()
        self._over: dict[str, bytes] = {}
        self._turn: str | None = None

    def __getattr__(self, name: str) -> Any:
        """A call of the file system, once it is this thread's turn."""
        call = getattr(self._filesystem, name)

        def in_turn(*given: Any, **named: Any) -> Any:
            me = threading.current_thread().name
            with self._changed:
                self._waiting.add(me)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._turn == me, 10)
                self._waiting.remove(me)
                self._turn = None
            return call(*given, **named)

        return in_turn

    def take(self, works: list[Callable[[], bytes]]) -> list[bytes]:
        """What each of the replicas ends with."""

        def work(name: str, does: Callable[[], bytes]) -> None:
            try:
                found = does()
            except Exception as error:  # noqa: BLE001 - no secret, and so not the others'
                found = repr(error).encode()
            with self._changed:
                self._over[name] = found
                self._changed.notify_all()

        for number, does in enumerate(works):
            threading.Thread(target=work, args=(str(number), does), name=str(number), daemon=True).start()
        with self._changed:
            while len(self._over) < len(works):
                quiet = self._changed.wait_for(
                    lambda: self._turn is None and len(self._waiting) + len(self._over) == len(works), 10
                )
                assert quiet, "a replica neither touches the store nor ends"
                if self._waiting:
                    self._turn = self._chance.choice(sorted(self._waiting))
                    self._changed.notify_all()
        return list(self._over.values())


def test_replicas_that_start_at_the_same_time_have_one_secret_in_any_order_of_their_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(agreed_value, "time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    for seed in range(60):
        place = tmp_path / str(seed)
        place.mkdir()
        turns = Turns(seed, fs.LocalFileSystem())
        monkeypatch.setattr(agreed_value, "opened", lambda _, turns=turns, place=place: (turns, str(place)))
        # Not the attribute: it has one lock for all instances of a process.
        ask = partial(StoredSessions.secret.func, StoredSessions("s3://bucket/runs/one"))
        secrets = turns.take([ask] * 3)
        assert (len(secrets), len({*secrets}), len(secrets[0])) == (3, 1, SECRET_BYTES), (seed, secrets)
