"""The weight store: what it keeps in the object store and on disk, and what it makes of a disk that fails it."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from actors import snapshot_files, weight_store
from actors.weight_store import WeightStore
from corpus.problems import RunProblem
from models.snapshot import Snapshot, pack, unpack, verify


@pytest.fixture(autouse=True)
def _objects_stay_here(monkeypatch):
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)


def store(directory: Path | None) -> Any:
    return WeightStore.__ray_metadata__.modified_class(None if directory is None else str(directory))  # pyright: ignore


def snapshot(update: int, attempt: int = 0) -> Snapshot:
    tied = torch.full((3, 2), update + attempt / 8)
    return pack({"embed": tied, "norm": torch.ones(5), "head": tied}, (attempt, update), torch.bfloat16)


def written(store: Any) -> Any:
    """The store's state once its thread has nothing to write."""
    deadline = time.monotonic() + 60
    while (state := store.state()).writing:
        assert time.monotonic() < deadline, "it is still being written"
        time.sleep(0.005)
    return state


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_last_two_versions_are_kept():
    each = store(None)
    assert each.newest() is None
    for update in range(3):
        [reference] = each.put(snapshot(update))
        assert reference.version == (0, update)
    version, [reference] = each.newest()
    assert (version, reference.version) == ((0, 2), (0, 2))
    assert each.state() == weight_store.StoreState([(0, 1), (0, 2)], [], False, None)


def test_the_last_two_are_on_disk_too_and_a_store_that_starts_again_has_the_newest(tmp_path):
    directory = tmp_path / "weights"
    each = store(directory)
    assert each.newest() is None
    for update in range(4):
        each.put(snapshot(update))
        written(each)
    assert names(directory) == ["attempt-0-update-000002.safetensors", "attempt-0-update-000003.safetensors"]

    again = store(directory)
    version, [found] = again.newest()
    assert version == (0, 3)
    verify(found)
    original = dict(unpack(snapshot(3)))
    assert found.checksum == snapshot(3).checksum
    assert all(torch.equal(tensor, original[name]) for name, tensor in unpack(found))
    assert again.state().held == [(0, 3)]


def test_a_file_is_safetensors_for_everybody(tmp_path):
    each = store(tmp_path)
    each.put(snapshot(3))
    written(each)
    with safe_open(tmp_path / "attempt-0-update-000003.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["buffer"]
        assert (file.get_tensor("buffer") == snapshot(3).buffer).all()


def test_a_later_attempt_goes_before_more_updates_of_an_earlier_one(tmp_path):
    each = store(tmp_path)
    for version in ((0, 8), (0, 9), (1, 5)):
        each.put(snapshot(version[1], version[0]))
        written(each)
    assert store(tmp_path).newest()[0] == (1, 5)
    assert written(each).on_disk == [(0, 9), (1, 5)]


def test_what_another_run_left_does_not_stay_before_the_weights_of_this_one(tmp_path):
    other = store(tmp_path)
    for update in (8, 9):
        other.put(snapshot(update, attempt=3))
        written(other)
    each = store(tmp_path)
    each.put(snapshot(0))
    assert written(each).on_disk == [(0, 0)]
    assert store(tmp_path).newest()[0] == (0, 0)


@pytest.mark.parametrize("damage", ["a bit of the weights", "the version", "cut", "empty", "no weights"])
def test_a_damaged_file_is_passed_over_for_the_one_before_with_a_warning(tmp_path, caplog, damage):
    each = store(tmp_path)
    for update in (1, 2):
        each.put(snapshot(update))
        written(each)
    path = tmp_path / "attempt-0-update-000002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "a bit of the weights":
        content[-70] ^= 1
    path.write_bytes(
        {
            "cut": content[:-8],
            "empty": b"",
            "the version": content.replace(b"[0, 2]", b"[0, 3]"),
            "no weights": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        }.get(damage, bytes(content))
    )
    with caplog.at_level(logging.WARNING):
        version, [found] = store(tmp_path).newest()
    assert (version, found.version) == ((0, 1), (0, 1))
    [warning] = caplog.records
    assert "weights on disk are passed over: " in warning.getMessage()
    assert "\n" not in warning.getMessage()
    path.with_name("attempt-0-update-000001.safetensors").write_bytes(b"")
    assert store(tmp_path).newest() is None


def test_what_a_process_that_died_was_writing_is_removed_and_never_read(tmp_path):
    (tmp_path / "attempt-0-update-000007.partial").write_bytes(b"half")
    assert store(tmp_path).newest() is None
    assert names(tmp_path) == []


def test_a_full_disk_is_told_and_the_weights_are_handed_out_all_the_same(tmp_path, caplog):
    each = store(tmp_path)
    each.put(snapshot(1))
    written(each)
    (tmp_path / "attempt-0-update-000002.partial").symlink_to("/dev/full")  # every write there finds the disk full
    with caplog.at_level(logging.WARNING):
        [reference] = each.put(snapshot(2))
        state = written(each)
    assert reference.version == (0, 2)
    assert "the weights of update 2 could not be written to disk: " in state.disk_problem
    assert "No space left on device" in state.disk_problem
    assert [record.getMessage() for record in caplog.records] == [state.disk_problem]
    assert names(tmp_path) == ["attempt-0-update-000001.safetensors"]
    assert each.newest()[0] == (0, 2)

    each.put(snapshot(3))  # there is room again
    assert written(each).disk_problem is None
    assert written(each).on_disk == [(0, 1), (0, 3)]


def test_a_publication_does_not_wait_for_the_disk_and_only_the_newest_waits_for_it(tmp_path, monkeypatch):
    gate, begun = threading.Event(), []
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        begun.append(self.name)
        assert gate.wait(60)
        return replace(self, target)

    monkeypatch.setattr(snapshot_files.Path, "replace", slow)
    each = store(tmp_path)
    began = time.monotonic()
    for update in range(5):
        each.put(snapshot(update))
    assert time.monotonic() - began < 30
    assert each.state().writing
    assert len(each.state().on_disk) == 0
    assert each.newest()[0] == (0, 4)
    gate.set()
    state = written(each)
    assert state.on_disk[-1] == (0, 4)
    assert begun[-1] == "attempt-0-update-000004.partial"
    assert len(begun) <= 3, "what a newer one has overtaken is not written"


def test_a_damaged_snapshot_is_kept_nowhere(tmp_path):
    each, whole = store(tmp_path), snapshot(1)
    damaged = Snapshot((0, 2), whole.buffer, whole.manifest, whole.checksum)
    with pytest.raises(RunProblem, match="is damaged: its checksum does not match"):
        each.put(damaged)
    assert written(each).on_disk == written(each).held == []
