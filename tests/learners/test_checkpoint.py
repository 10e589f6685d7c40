import errno
import json
import os
import resource
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from corpus.problems import RunProblem
from learners import checkpoint_place
from learners.checkpoint import list_complete, load_newest, write_checkpoint
from learners.checkpoint_place import CheckpointPlace

TENSORS = {"policy": {"a.weight": torch.arange(6.0).reshape(2, 3)}, "moments": {"a.weight": torch.full((2, 3), 0.5)}}
TABLES = {"episodes": pa.table({"slot": [3, 4]})}


def write(root: Path, step: int, **options) -> Path:
    return write_checkpoint(root, step, TENSORS, {"step": step, "beta": 0.02}, TABLES, **options)


def steps(root: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_complete(root)]


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 12)
    found = load_newest(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.data) == (path, 12, {"step": 12, "beta": 0.02})
    assert found.tables["episodes"].equals(TABLES["episodes"])
    for group, tensors in TENSORS.items():
        assert torch.equal(found.tensors[group]["a.weight"], tensors["a.weight"])


def test_an_empty_or_missing_root_has_no_checkpoint(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None
    assert list_complete(tmp_path / "missing") == []


def test_the_manifest_names_its_version_and_every_file(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("file", ["policy.safetensors", "data.json", "episodes.parquet"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog, file, damage):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    path = newest / file
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert newest.name in caplog.text
    assert file in caplog.text


@pytest.mark.parametrize("file", ["policy.safetensors", "manifest.json"])
def test_a_file_that_the_disk_does_not_read_is_passed_over_too(tmp_path, monkeypatch, caplog, file):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    sha256_of, manifest = checkpoint_place.sha256_of, CheckpointPlace._manifest
    broken = [newest]

    def failing(path):
        if path in [directory / file for directory in broken]:
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    class Disk:
        """A file system that does not read what is broken."""

        def __init__(self, real):
            self._real = real

        def open_input_stream(self, inner, compression):
            failing(Path(inner))
            return self._real.open_input_stream(inner, compression=compression)

    def reading(place, name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, "_filesystem", Disk(place._filesystem))
            return manifest(place, name)

    monkeypatch.setattr(checkpoint_place, "sha256_of", failing)
    monkeypatch.setattr(CheckpointPlace, "_manifest", reading)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert found.passed_over == {newest.name}
    assert f"{newest.name} is passed over: {file} cannot be read ([Errno 5] Input/output error)" in caplog.text
    broken.append(tmp_path / "step-00000001-1")
    with pytest.raises(RunProblem, match="there are checkpoints, but none"):
        load_newest(tmp_path)


def test_one_whose_content_is_wrong_does_not_displace_the_last_good_one(tmp_path):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2) / "data.json"
    damaged.write_text(damaged.read_text().replace("2", "3"))
    found = load_newest(tmp_path)
    assert found is not None
    write(tmp_path, 3, unreadable=found.passed_over)
    assert steps(tmp_path) == [1, 3]
    pinned = write(tmp_path, 4, keep=3)
    (pinned / "pinned").touch()
    write(tmp_path, 9, keep=3)
    write(tmp_path, 5, keep=3)
    assert steps(tmp_path) == [1, 3, 4, 5, 9], "neither a pinned one nor a later one counts"


@pytest.mark.parametrize("manifest", [None, ""])
def test_a_checkpoint_that_was_never_finished_is_none(tmp_path, caplog, manifest):
    newest = write(tmp_path, 1)
    (newest / "manifest.json").unlink()
    if manifest is not None:
        (newest / "manifest.json").write_text(manifest)
    assert load_newest(tmp_path) is None
    assert newest.name in caplog.text


OTHER_SCHEMA = '{"schema_version": 99, "files": {}}'


@pytest.mark.parametrize("manifest", ["{", OTHER_SCHEMA, "[]"])
def test_where_no_checkpoint_can_be_read_that_is_told_and_nothing_is_removed(tmp_path, manifest):
    paths = [write(tmp_path, step) for step in (1, 2)]
    for path in paths:
        (path / "manifest.json").write_text(manifest)
    for identity in (None, "one"):
        with pytest.raises(RunProblem, match=rf"none that .* step-00000001-1: its .* remove {tmp_path} first") as found:
            load_newest(tmp_path, identity)
        assert found.value.code == "checkpoint/unreadable"
    assert all(path.exists() for path in paths)


def test_a_checkpoint_of_another_version_is_passed_over_and_never_removed(tmp_path, caplog):
    others = [write(tmp_path, step, keep=3) for step in (1, 2, 9)]
    for path in others:
        (path / "manifest.json").write_text(OTHER_SCHEMA)
    for step in (4, 5, 6):
        write(tmp_path, step)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.step == 6
    assert "its schema version is 99" in caplog.text
    assert steps(tmp_path) == [5, 6]
    CheckpointPlace(tmp_path).remove_all()
    assert [path for path in tmp_path.iterdir() if path not in others] == []
    assert all(path.exists() for path in others)


def test_of_checkpoints_of_several_identities_the_newest_of_the_wanted_one_is_read(tmp_path):
    for step, identity in ((1, "one"), (2, "other")):
        write_checkpoint(tmp_path, step, TENSORS, {"identity": identity})
    found = load_newest(tmp_path, "one")
    assert found is not None
    assert found.step == 1
    assert load_newest(tmp_path, "third") is None


def test_only_the_newest_and_the_pinned_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, keep=2, pinned={2})
    assert steps(tmp_path) == [2, 5, 6]
    write(tmp_path, 7, keep=1)
    assert steps(tmp_path) == [7]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_step_again_is_a_new_directory_and_the_later_wins(tmp_path):
    first = write(tmp_path, 5)
    second = write_checkpoint(tmp_path, 5, TENSORS, {"later": True})
    assert first != second
    found = load_newest(tmp_path)
    assert found is not None
    assert found.data == {"later": True}


def test_who_comes_late_to_a_name_harms_nothing_of_the_checkpoint_that_has_it(tmp_path, monkeypatch):
    """As a holder that stood still between looking for a name and taking it, and was succeeded meanwhile."""
    first = write(tmp_path, 5)
    monkeypatch.setattr(CheckpointPlace, "fresh", lambda place, step: first.name)
    with pytest.raises(RunProblem, match=r"the checkpoint of step 5 was not written: .*File exists"):
        write_checkpoint(tmp_path, 5, TENSORS, {"later": True})
    found = load_newest(tmp_path)
    assert found is not None
    assert found.data == {"step": 5, "beta": 0.02}


def test_remains_of_a_crash_do_not_count_towards_those_kept_and_go_when_they_are_old(tmp_path):
    write(tmp_path, 1)
    crashed = tmp_path / "step-00000002-1"
    crashed.mkdir()
    (crashed / "data.json").write_text("{")
    write(tmp_path, 3)
    assert steps(tmp_path) == [1, 3]
    assert not crashed.exists()


def test_a_crash_at_any_write_leaves_the_earlier_checkpoint_the_newest(tmp_path, monkeypatch):
    write(tmp_path, 1)
    real = os.fsync
    count = 0

    class Crash(BaseException):
        pass

    def crash_at(number):
        def fsync(descriptor):
            nonlocal count
            count += 1
            if count == number:
                raise Crash
            real(descriptor)

        return fsync

    survived = 0
    for number in range(1, 50):
        count = 0
        monkeypatch.setattr(os, "fsync", crash_at(number))
        try:
            write(tmp_path, 1 + number, keep=50)
        except Crash:
            survived += 1
            found = load_newest(tmp_path)
            assert found is not None
            assert found.step == 1 or (tmp_path / f"step-{1 + number:08d}-1" / "manifest.json").exists()
        else:
            break
    assert survived >= 6  # four files, two directories and the manifest are flushed


@pytest.mark.parametrize(
    ("tensors", "data"),
    [({"weights": {"a": torch.zeros(10_000)}}, {}), ({}, {"a": "b" * 9000})],
    ids=["tensors", "data"],
)
def test_a_full_disk_is_told_and_the_space_given_back(tmp_path, tensors, data):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # Python ignores the signal: writing raises EFBIG
    try:
        with pytest.raises(RunProblem, match="step 2 was not written: the disk is full; earlier ones are intact"):
            write_checkpoint(tmp_path, 2, tensors, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tensor_that_is_not_contiguous_is_written_as_it_looks(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_checkpoint(tmp_path, 1, {"weights": {"a": tensor}}, {})
    found = load_newest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["weights"]["a"], tensor)


def test_one_that_a_person_pinned_is_spared(tmp_path):
    (write(tmp_path, 1) / "pinned").touch()
    for step in range(2, 5):
        write(tmp_path, step, keep=1)
    assert steps(tmp_path) == [1, 4]
    CheckpointPlace(tmp_path).remove_all()
    assert steps(tmp_path) == [1]
    (tmp_path / "step-00000001-1" / "pinned").unlink()
    CheckpointPlace(tmp_path).remove_all()
    assert not tmp_path.exists()


def test_what_cannot_be_removed_is_warned_of_and_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointPlace, "remove", refuse)
        write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [1, 2]
    assert "older checkpoints in" in caplog.text
    assert "Permission denied" in caplog.text


def refuse(place, name):
    raise PermissionError(13, "Permission denied")
