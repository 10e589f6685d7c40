"""Published snapshots: whole or not there, retained as many as wanted, pinned ones too, and never of another stage."""

import json
import os
from pathlib import Path

import pytest
import test_weight_store as weights_on_disk
import torch

from actors.published import (
    DESIRED_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    PublishedFiles,
    pinned_of,
    published,
    read_published,
)
from corpus.problems import RunProblem
from models.snapshot import Snapshot, pack, unpack


def snapshot(update: int, attempt: int = 0) -> Snapshot:
    return pack({"embed": torch.full((3, 2), float(update)), "norm": torch.ones(5)}, (attempt, update))


def labels(directory: Path) -> list[str]:
    return [one.label for one in published(directory)]


def test_what_was_published_is_read_back(tmp_path):
    PublishedFiles(tmp_path, "a", 3).save(snapshot(7))
    [one] = published(tmp_path)
    assert (one.label, one.identity, one.version) == ("0.7", "a", (0, 7))
    assert dict(unpack(one.load()))["embed"].tolist() == [[7.0, 7.0]] * 3


def test_a_file_that_lies_on_the_disk_is_linked_and_survives_its_first_name(tmp_path):
    from actors.snapshot_files import write_snapshot

    file = tmp_path / "first.safetensors"
    write_snapshot(file, snapshot(1))
    PublishedFiles(tmp_path / "published", "a", 3).save(snapshot(1), file)
    [one] = published(tmp_path / "published")
    assert os.stat(one.weights).st_ino == os.stat(file).st_ino
    file.unlink()
    assert one.load().version == (0, 1)


def test_the_last_ones_are_kept_and_a_later_attempt_is_newer(tmp_path):
    files = PublishedFiles(tmp_path, "a", 2)
    for update in (1, 2, 3):
        files.save(snapshot(update))
    assert labels(tmp_path) == ["0.2", "0.3"]
    files.save(snapshot(1, attempt=1))
    assert labels(tmp_path) == ["0.3", "1.1"]


def test_a_pinned_one_stays(tmp_path):
    (tmp_path / DESIRED_FILE).parent.mkdir(parents=True)
    (tmp_path / DESIRED_FILE).write_text(json.dumps({"pinned": "policy@1"}))
    files = PublishedFiles(tmp_path / "published", "a", 1)
    for update in (1, 2, 3):
        files.save(snapshot(update))
    assert labels(tmp_path / "published") == ["0.1", "0.3"]
    (tmp_path / DESIRED_FILE).write_text(json.dumps({"pinned": None}))
    files.save(snapshot(4))
    assert labels(tmp_path / "published") == ["0.4"]


def test_without_its_manifest_there_is_no_snapshot(tmp_path):
    PublishedFiles(tmp_path, "a", 3).save(snapshot(1))
    (tmp_path / "0.1" / MANIFEST_FILE).unlink()
    assert published(tmp_path) == []
    PublishedFiles(tmp_path, "a", 3)
    assert not (tmp_path / "0.1").exists()


def test_half_a_snapshot_is_not_left_by_a_full_disk(tmp_path, monkeypatch):
    files = PublishedFiles(tmp_path, "a", 3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("actors.published._write_whole", full)
    with pytest.raises(OSError, match="No space"):
        files.save(snapshot(1))
    assert not (tmp_path / "0.1").exists()


def test_snapshots_of_other_settings_go_when_a_stage_begins(tmp_path):
    PublishedFiles(tmp_path, "a", 3).save(snapshot(9))
    PublishedFiles(tmp_path, "a", 3)
    assert labels(tmp_path) == ["0.9"]
    PublishedFiles(tmp_path, "b", 3)
    assert labels(tmp_path) == []


def test_a_damaged_one_is_seen(tmp_path):
    PublishedFiles(tmp_path, "a", 3).save(snapshot(1))
    one = read_published(tmp_path, (0, 1))
    assert one is not None
    content = bytearray((tmp_path / "0.1" / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "0.1" / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(RunProblem, match="damaged"):
        one.load()


@pytest.mark.parametrize(
    ("name", "version"),
    [("policy@2", (1, 2)), ("policy@0.2", (0, 2)), ("policy@5", None), ("policy@../2", None), ("policy", None)],
)
def test_a_name_means_one_version(name, version):
    assert pinned_of([(0, 1), (0, 2), (1, 2)], name) == version


def test_the_weight_store_publishes_every_so_many_updates(tmp_path, monkeypatch):
    from actors import weight_store

    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    store = weights_on_disk.store(tmp_path / "weights")
    store.publish_to(str(tmp_path / "published"), "a", 2, 2)
    for update in range(5):
        store.put(weights_on_disk.snapshot(update))
        assert weights_on_disk.written(store).disk_problem is None
    assert labels(tmp_path / "published") == ["0.2", "0.4"]


def test_the_weight_store_says_where_it_cannot_publish(tmp_path, monkeypatch):
    from actors import weight_store

    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    store = weights_on_disk.store(tmp_path / "weights")
    (tmp_path / "published").write_text("a file")
    store.publish_to(str(tmp_path / "published"), "a", 1, 2)
    store.put(weights_on_disk.snapshot(0))
    assert "could not be written" in weights_on_disk.written(store).disk_problem
