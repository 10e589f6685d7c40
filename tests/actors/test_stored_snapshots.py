"""Published snapshots in an object store: whole or not there, retained as many as wanted, and of one holder alone."""

import json
import logging
import time
from pathlib import Path

import pytest
import test_weight_store as weights_on_disk

from actors import stored_snapshots, weight_store
from actors.published import STORED_WISHES, PublishedFiles, PublishedSnapshot, read_published
from actors.stored_snapshots import StoredRun, StoredSnapshots
from corpus.numbered_objects import NumberedObjects
from corpus.problems import RunProblem
from corpus.run_epoch import RunEpoch
from corpus.storage import below

pytest_plugins = ["tests.object_store"]

PUBLISHED = "runs/one/published/"


@pytest.fixture
def address(store, query):
    return f"s3://bucket/runs/one{query}"


@pytest.fixture
def run(address):
    return StoredRun(address, None)


def on_disk(directory: Path, update: int, attempt: int = 0, identity: str = "a") -> PublishedSnapshot:
    PublishedFiles(directory, identity, 9).save(weights_on_disk.snapshot(update, attempt))
    found = read_published(directory, (attempt, update))
    assert found is not None
    return found


def both(*labels: str) -> list[str]:
    return [f"{PUBLISHED}{label}/{name}" for label in labels for name in ("manifest.json", "weights.safetensors")]


def test_the_store_has_what_the_disk_has_the_manifest_last(run, tmp_path, store, keys_in, monkeypatch):
    sent, real = [], stored_snapshots.send

    def send(source, filesystem, inner):
        assert keys_in(PUBLISHED) == []
        sent.append(source.name)
        return real(source, filesystem, inner)

    monkeypatch.setattr(stored_snapshots, "send", send)
    one, writer = on_disk(tmp_path, 7), StoredSnapshots(run, "a", 3)
    writer.save(one)
    assert (keys_in(PUBLISHED), sent, writer.saved) == (both("0.7"), ["weights.safetensors"], 1)
    for name in ("manifest.json", "weights.safetensors"):
        body = store.get_object(Bucket="bucket", Key=f"{PUBLISHED}0.7/{name}")["Body"].read()
        assert body == (tmp_path / "0.7" / name).read_bytes()
    writer.save(one)
    assert (sent, writer.saved) == (["weights.safetensors"], 1)  # it is there already


def test_the_last_ones_and_a_pinned_one_stay(run, address, tmp_path, keys_in):
    writer = StoredSnapshots(run, "a", 2)
    for update in (1, 2, 3):
        writer.save(on_disk(tmp_path, update))
    assert keys_in(PUBLISHED) == both("0.2", "0.3")
    wishes = NumberedObjects(below(address, STORED_WISHES))
    wishes.put_after(0, json.dumps({"pinned": "policy@2"}).encode())
    writer.save(on_disk(tmp_path, 4))
    writer.save(on_disk(tmp_path, 1, attempt=1))
    assert keys_in(PUBLISHED) == both("0.2", "0.4", "1.1")
    wishes.put_after(1, json.dumps({"pinned": None}).encode())
    writer.save(on_disk(tmp_path, 2, attempt=1))
    assert keys_in(PUBLISHED) == both("1.1", "1.2")


def test_what_is_half_or_of_other_settings_goes_with_the_first_that_is_saved(run, tmp_path, store, keys_in):
    StoredSnapshots(run, "b", 3).save(on_disk(tmp_path / "b", 9, identity="b"))
    store.put_object(Bucket="bucket", Key=f"{PUBLISHED}0.8/weights.safetensors", Body=b"half")
    writer = StoredSnapshots(run, "a", 3)
    assert len(keys_in(PUBLISHED)) == 3
    writer.save(on_disk(tmp_path / "a", 1))
    assert keys_in(PUBLISHED) == both("0.1")


def test_a_holder_that_was_taken_over_publishes_and_removes_nothing(address, tmp_path, store, keys_in):
    def hold(number):
        holder = json.dumps({"epoch": number, "pid": 1, "host": "far-away", "started": "today"})
        store.put_object(Bucket="bucket", Key=f"runs/one/leases/epoch-{number:06d}-abc.json", Body=holder.encode())

    hold(1)
    old = StoredSnapshots(StoredRun(address, RunEpoch(below(address, "leases"), 1)), "a", 1)
    old.save(on_disk(tmp_path, 1))
    hold(2)
    new = StoredSnapshots(StoredRun(address, RunEpoch(below(address, "leases"), 2)), "a", 1)
    new.save(on_disk(tmp_path, 1, attempt=1))
    with pytest.raises(RunProblem, match="was taken over by process 1 on far-away"):
        old.save(on_disk(tmp_path, 2))
    assert keys_in(PUBLISHED) == both("1.1")


def test_a_holder_that_is_taken_over_while_it_sends_does_not_commit(address, tmp_path, store, keys_in, monkeypatch):
    class Epoch(RunEpoch):
        def check(self):
            if any(name.startswith(f"{PUBLISHED}0.1/weights") for name in keys_in(PUBLISHED)):
                raise RunProblem("taken over", "lease/lost")

    writer = StoredSnapshots(StoredRun(address, Epoch("nowhere", 1)), "a", 1)
    with pytest.raises(RunProblem, match="taken over"):
        writer.save(on_disk(tmp_path, 1))
    assert keys_in(PUBLISHED) == [f"{PUBLISHED}0.1/weights.safetensors"]  # half of it is no snapshot


def test_a_file_that_does_not_arrive_whole_is_not_published(run, tmp_path, keys_in, monkeypatch):
    def cut(source, filesystem, inner):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(source.read_bytes()[:-1])
        return source.stat().st_size

    with monkeypatch.context() as patch:
        patch.setattr(stored_snapshots, "send", cut)
        with pytest.raises(OSError, match="arrived with"):
            StoredSnapshots(run, "a", 3).save(on_disk(tmp_path, 1))
    assert keys_in(PUBLISHED) == []


def test_one_that_newer_ones_have_overtaken_on_the_disk_is_left_out(run, tmp_path, keys_in):
    one = on_disk(tmp_path, 1)
    (tmp_path / "0.1" / "manifest.json").unlink()
    writer = StoredSnapshots(run, "a", 3)
    writer.save(one)
    assert (keys_in(PUBLISHED), writer.saved) == ([], 0)


def test_the_weight_store_goes_on_without_the_store_and_tries_again_with_the_next(
    store, query, tmp_path, monkeypatch, caplog, keys_in
):
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    each = weights_on_disk.store(tmp_path / "weights")
    assert set(each.figures()) == {"memory/weight_store_bytes"}
    away = StoredRun(f"s3://bucket/runs/one{query}", RunEpoch(f"s3://away/leases{query}", 1))
    each.publish_to(str(tmp_path / "published"), "a", 1, 2, away)

    def settled() -> dict[str, float]:
        assert weights_on_disk.written(each).disk_problem is None
        give_up = time.monotonic() + 60
        while each._to_store.is_busy:
            assert time.monotonic() < give_up, "it is still being sent"
            time.sleep(0.005)
        return {name: value for name, value in each.figures().items() if name.startswith("published/")}

    with caplog.at_level(logging.WARNING):
        each.put(weights_on_disk.snapshot(0))
        assert settled() == {"published/stored": 0, "published/failed": 1}
    [warning] = caplog.records
    assert warning.getMessage().startswith("the weights of update 0 did not reach the object store: ")
    store.create_bucket(Bucket="away")
    claim = json.dumps({"epoch": 1, "pid": 1, "host": "here", "started": "today"}).encode()
    store.put_object(Bucket="away", Key="leases/epoch-000001-abc.json", Body=claim)
    try:
        each.put(weights_on_disk.snapshot(1))
        assert settled() == {"published/stored": 1, "published/failed": 1}
    finally:
        store.delete_object(Bucket="away", Key="leases/epoch-000001-abc.json")
        store.delete_bucket(Bucket="away")
    assert keys_in(PUBLISHED) == both("0.1")
