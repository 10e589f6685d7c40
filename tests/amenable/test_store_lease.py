"""One writer of a run in an object store: with real processes, and claims of machines that are not there."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from amenable import store_lease
from amenable.store_lease import StoreLease
from corpus.problems import RunProblem, UsageProblem

pytest_plugins = ["tests.object_store"]

HOLDER = """
import sys, time
from pathlib import Path
from amenable.store_lease import StoreLease
Path(sys.argv[2]).mkdir(parents=True)
with StoreLease(sys.argv[1], Path(sys.argv[2])) as lease:
    print(lease.epoch, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def address(store, query):
    return f"s3://bucket/runs/one{query}"


@pytest.fixture
def lease(address, tmp_path):
    """Makes leases of the run, each with a working copy of its own, as on machines that share nothing but the store."""

    def make(copy="copy"):
        (tmp_path / copy).mkdir(exist_ok=True)
        return StoreLease(address, tmp_path / copy)

    return make


@pytest.fixture
def claims(store, keys_in):
    """Epoch and content of every claim there is."""

    def read():
        names = keys_in("runs/one/leases/")
        bodies = [json.loads(store.get_object(Bucket="bucket", Key=name)["Body"].read()) for name in names]
        return [(each["epoch"], each["held"], each["pid"]) for each in bodies]

    return read


def far_away(store, epoch=3, held=True):
    """A claim of a process on another machine, as it would be there now."""
    holder = {
        "host": "far-away",
        "pid": 4242,
        "process": "another-boot/pid:[1]/77",
        "started": "2026-01-01T00:00:00+00:00",
        "epoch": epoch,
        "held": held,
    }
    store.put_object(
        Bucket="bucket", Key=f"runs/one/leases/epoch-{epoch:06d}-abc123.json", Body=json.dumps(holder).encode()
    )


def test_the_epoch_grows_and_only_the_last_claim_stays(lease, claims):
    with lease() as one:
        assert one.epoch == 1
        one.check()
        assert claims() == [(1, True, os.getpid())]
    assert claims() == [(1, False, os.getpid())]
    with lease("elsewhere") as two:
        assert two.epoch == 2
        assert claims() == [(2, True, os.getpid())]


def test_a_live_holder_is_named_and_a_killed_one_is_succeeded(lease, address, tmp_path, claims):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, address, str(tmp_path / "its")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        with pytest.raises(UsageProblem, match=rf"^s3://bucket/runs/one is in use by process {process.pid} .*--run"):
            lease().__enter__()
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert claims() == [(1, True, process.pid)]
    with lease() as mine:
        assert mine.epoch == 2


def test_a_holder_on_another_machine_lives_while_it_renews_its_claim(lease, store, monkeypatch, keys_in):
    far_away(store)
    with pytest.raises(UsageProblem, match=r"in use by process 4242 on far-away .*last seen .* ago; wait for it"):
        lease().__enter__()
    assert keys_in("runs/one/leases/") == ["runs/one/leases/epoch-000003-abc123.json"]  # no knock is left
    now = StoreLease._now
    monkeypatch.setattr(StoreLease, "_now", lambda self: now(self) + 61)
    with lease() as mine:
        assert mine.epoch == 4


def test_a_holder_renews_its_claim(lease, store, monkeypatch, keys_in):
    renewed = threading.Event()
    real = StoreLease._write

    def write(self, holder):
        real(self, holder)
        if threading.current_thread().name == "store-lease":
            renewed.set()

    monkeypatch.setattr(StoreLease, "_write", write)
    monkeypatch.setattr(store_lease, "SIGN_OF_LIFE_EVERY_S", 0.05)
    with lease():
        assert renewed.wait(10)
    assert len(keys_in("runs/one/leases/")) == 1


def test_an_older_holder_is_refused_and_does_not_give_back_what_is_not_its(lease, store, claims):
    with lease() as old:
        epoch = old.run_epoch
        far_away(store, epoch=2)
        for check in (old.check, epoch.check):
            with pytest.raises(RunProblem, match=r"runs/one was taken over by process 4242 on far-away .*stops here"):
                check()
    assert (2, True, 4242) in claims()
    assert (1, True, os.getpid()) in claims()


def test_a_lease_that_was_removed_stops_the_run(lease, store, keys_in):
    with lease() as mine:
        for name in keys_in("runs/one/leases/"):
            store.delete_object(Bucket="bucket", Key=name)
        with pytest.raises(RunProblem, match="is gone: someone removed it"):
            mine.check()


def test_who_sees_another_claim_of_its_epoch_takes_its_own_back_and_tries_again(lease, store, monkeypatch, claims):
    waits = []
    monkeypatch.setattr(store_lease.time, "sleep", waits.append)
    real = StoreLease._write
    rival = iter([True, False])

    def write(self, holder):
        if next(rival, False):
            far_away(store, epoch=holder.epoch, held=False)  # listed at the same moment, and given back at once
        real(self, holder)

    monkeypatch.setattr(StoreLease, "_write", write)
    with lease() as mine:
        assert mine.epoch == 2
    assert len(waits) == 1
    assert [epoch for epoch, _, _ in claims()] == [2]


def test_of_many_that_take_it_at_once_at_most_one_has_it(lease, monkeypatch):
    monkeypatch.setattr(store_lease, "TRIES", 1)
    leases = [lease(f"copy-{number}") for number in range(6)]
    taken, refused = [], []
    start = threading.Barrier(len(leases))

    def take(each):
        start.wait()
        try:
            each.__enter__()
        except UsageProblem as problem:
            refused.append(str(problem))
        else:
            taken.append(each)

    threads = [threading.Thread(target=take, args=(each,)) for each in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) + len(refused) == len(leases)
    assert len(taken) <= 1
    for each in taken:
        each.check()
        each.__exit__(None, None, None)


def test_two_commands_of_one_machine_share_a_working_copy_and_the_second_is_refused(lease):
    with lease(), pytest.raises(UsageProblem, match=f"is in use by process {os.getpid()}"):
        lease().__enter__()


def test_a_store_that_refuses_gives_no_lease_and_leaves_the_working_copy_free(query, keys, tmp_path):
    for _ in range(2):
        with pytest.raises(UsageProblem, match=r"^s3://nowhere/one cannot be written to"):
            StoreLease(f"s3://nowhere/one{query}", tmp_path).__enter__()
