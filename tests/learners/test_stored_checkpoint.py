"""Checkpoints in an object store, as an S3 server on this machine keeps it: the same rules, and nothing is renamed."""

import json

import pyarrow as pa
import pytest
import torch

from corpus.problems import RunProblem
from corpus.storage import below
from learners import checkpoint_place
from learners.checkpoint import list_complete, load_newest, write_checkpoint
from learners.checkpoint_place import CheckpointPlace

pytest_plugins = ["tests.object_store"]

TENSORS = {"policy": {"a.weight": torch.arange(6.0).reshape(2, 3)}, "moments": {"a.weight": torch.full((2, 3), 0.5)}}
TABLES = {"episodes": pa.table({"slot": [3, 4]})}
FILES = ["data.json", "episodes.parquet", "manifest.json", "moments.safetensors", "policy.safetensors"]


@pytest.fixture
def root(store, query):
    """An address at which nothing is yet."""
    return f"s3://bucket/runs/one/checkpoints{query}"


def write(root, step, **options):
    return write_checkpoint(root, step, TENSORS, {"step": step, "beta": 0.02}, TABLES, **options)


def steps(root):
    return [int(str(address).partition("?")[0].rpartition("/")[2].split("-")[1]) for address in list_complete(root)]


def test_what_is_written_is_read(root, query, keys_in):
    assert load_newest(root) is None
    address = write(root, 12)
    assert address == f"s3://bucket/runs/one/checkpoints/step-00000012-1{query}"
    assert keys_in() == [f"runs/one/checkpoints/step-00000012-1/{name}" for name in FILES]
    found = load_newest(root)
    assert found is not None
    assert (found.path, found.step, found.data) == (address, 12, {"step": 12, "beta": 0.02})
    assert found.tables["episodes"].equals(TABLES["episodes"])
    for group, tensors in TENSORS.items():
        assert torch.equal(found.tensors[group]["a.weight"], tensors["a.weight"])


def test_the_manifest_comes_last_and_nothing_is_renamed(root, monkeypatch):
    calls = []
    real = CheckpointPlace.__init__

    def watched(place, given):
        real(place, given)
        place._filesystem = Watched(place._filesystem, calls)

    monkeypatch.setattr(CheckpointPlace, "__init__", watched)
    monkeypatch.setattr(checkpoint_place, "send", lambda source, filesystem, inner: sent(source, filesystem, inner))
    write(root, 1)
    written = [inner.rpartition("/")[2] for name, inner in calls if name == "open_output_stream"]
    assert sorted(written) == FILES
    assert written[-1] == "manifest.json"
    assert not {name for name, _ in calls} & {"move", "copy_file"}
    calls.clear()
    write(root, 2, keep=1)
    removed = [(name, inner.rpartition("/")[2]) for name, inner in calls if name.startswith("delete")]
    assert removed == [("delete_file", "manifest.json"), ("delete_dir", "step-00000001-1")]


def sent(source, filesystem, inner):
    with filesystem.open_output_stream(inner) as stream:
        stream.write(source.read_bytes())


class Watched:
    """A file system whose calls are written down."""

    def __init__(self, filesystem, calls):
        self._filesystem, self._calls = filesystem, calls

    def __getattr__(self, name):
        def call(inner, *arguments, **options):
            self._calls.append((name, inner if isinstance(inner, str) else ""))
            return getattr(self._filesystem, name)(inner, *arguments, **options)

        return call


@pytest.mark.parametrize("arrives", range(len(FILES)))
def test_an_upload_that_ends_anywhere_is_no_checkpoint(root, monkeypatch, keys_in, arrives):
    write(root, 1)

    class Killed(BaseException):
        pass

    count = 0
    real = checkpoint_place.send

    def killed(source, filesystem, inner):
        nonlocal count
        if count == arrives:
            raise Killed
        count += 1
        return real(source, filesystem, inner)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_place, "send", killed)
        if arrives == len(FILES) - 1:  # everything but the manifest
            patch.setattr(CheckpointPlace, "_listed", lambda place, inner: (_ for _ in ()).throw(Killed()))
            patch.setattr(CheckpointPlace, "fresh", lambda place, step: f"step-{step:08d}-1")
        with pytest.raises(Killed):
            write(root, 2)
    assert len(keys_in("runs/one/checkpoints/step-00000002-1/")) == arrives
    found = load_newest(root)
    assert found is not None
    assert found.step == 1
    write(root, 3)  # what the upload left is older than a whole one, and goes
    assert steps(root) == [1, 3]
    assert keys_in("runs/one/checkpoints/step-00000002-1/") == []


def test_a_file_that_does_not_arrive_is_told_and_nothing_is_left(root, monkeypatch, keys_in):
    write(root, 1)
    real = checkpoint_place.send

    def cut(source, filesystem, inner):
        if inner.endswith("policy.safetensors"):
            with filesystem.open_output_stream(inner) as stream:
                stream.write(source.read_bytes()[:-1])
            return source.stat().st_size
        return real(source, filesystem, inner)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_place, "send", cut)
        with pytest.raises(RunProblem, match=r"checkpoint of step 2 was not written: policy\.safetensors arrived with"):
            write(root, 2)
    assert steps(root) == [1]
    assert keys_in("runs/one/checkpoints/step-00000002-1/") == []


def test_who_may_not_commit_any_more_leaves_no_manifest_and_removes_nothing(root, tmp_path, keys_in):
    def taken_over():
        raise RunProblem("taken over", "run/unexpected")

    for place in (root, tmp_path):
        write(place, 1)
        with pytest.raises(RunProblem, match="taken over"):
            write(place, 2, keep=1, may_commit=taken_over)
        assert steps(place) == [1]
    there = [name.rpartition("/")[2] for name in keys_in("runs/one/checkpoints/step-00000002-1/")]
    assert there == [name for name in FILES if name != "manifest.json"]


def test_whose_upload_fails_after_the_run_was_taken_over_removes_nothing(root, monkeypatch, keys_in):
    write(root, 1)
    monkeypatch.setattr(CheckpointPlace, "fresh", lambda place, step: "step-00000001-1")  # the successor's, by now

    def fails(*_):
        raise OSError("no connection")

    def taken_over():
        raise RunProblem("taken over", "run/unexpected")

    monkeypatch.setattr(checkpoint_place, "send", fails)
    with pytest.raises(RunProblem, match="taken over"):
        write(root, 1, may_commit=taken_over)
    assert len(keys_in("runs/one/checkpoints/step-00000001-1/")) == len(FILES)


def test_a_store_that_refuses_is_told_in_one_sentence(store, query):
    with pytest.raises(RunProblem, match=r"^s3://nowhere/a: the checkpoint of step 1 was not written: .*NO_SUCH"):
        write(f"s3://nowhere/a{query}", 1)


def test_a_store_that_does_not_answer_is_not_one_without_checkpoints(root, monkeypatch):
    write(root, 1)

    def fail(*_, **__):
        raise OSError("When listing objects: no connection")

    real = CheckpointPlace.__init__

    def cut_off(place, given):
        real(place, given)
        place._filesystem = type("Gone", (), {"get_file_info": fail, "open_input_stream": fail})()

    monkeypatch.setattr(CheckpointPlace, "__init__", cut_off)
    with pytest.raises(RunProblem, match=r"checkpoints cannot be read \(When listing.*the same command continues"):
        load_newest(root)


@pytest.mark.parametrize("file", ["policy.safetensors", "data.json", "episodes.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "wrong", "missing"])
def test_a_damaged_one_is_passed_over_by_name_for_the_one_before(store, root, caplog, file, damage):
    write(root, 1)
    write(root, 2)
    key = f"runs/one/checkpoints/step-00000002-1/{file}"
    content = bytearray(store.get_object(Bucket="bucket", Key=key)["Body"].read())
    if damage == "missing":
        store.delete_object(Bucket="bucket", Key=key)
    else:
        if damage == "truncated":
            content = content[:-1]
        else:
            content[-1] ^= 1
        store.put_object(Bucket="bucket", Key=key, Body=bytes(content))
    found = load_newest(root)
    assert found is not None
    assert found.step == 1
    told = {
        "missing": f"{file} is missing",
        "truncated": f"{file} is damaged: it has {len(content):,} bytes, not {len(content) + 1:,}",
        "wrong": f"{file} is damaged: its content is not what was written",
    }[damage]
    assert f"checkpoint s3://bucket/runs/one/checkpoints/step-00000002-1 is passed over: {told}" in " ".join(
        record.getMessage() for record in caplog.records
    )


@pytest.mark.parametrize("manifest", [b"{", b'{"schema_version": 1, "files": {}}', b'{"schema_version": 9}', b"[]"])
def test_a_damaged_manifest_is_none(store, root, caplog, manifest):
    write(root, 1)
    write(root, 2)
    store.put_object(Bucket="bucket", Key="runs/one/checkpoints/step-00000002-1/manifest.json", Body=manifest)
    found = load_newest(root)
    assert found is not None
    assert found.step == 1
    assert "step-00000002-1 is passed over: its" in caplog.text


def test_the_newest_the_named_and_the_pinned_are_kept(store, root, keys_in):
    for step in range(1, 7):
        write(root, step, keep=2, pinned={2})
        if step == 3:
            store.put_object(Bucket="bucket", Key="runs/one/checkpoints/step-00000003-1/pinned", Body=b"")
    assert steps(root) == [2, 3, 5, 6]
    CheckpointPlace(root).remove_all()
    assert steps(root) == [3]
    store.delete_object(Bucket="bucket", Key="runs/one/checkpoints/step-00000003-1/pinned")
    CheckpointPlace(root).remove_all()
    assert keys_in() == []


def test_the_same_step_again_is_a_new_directory_and_the_later_wins(root):
    write(root, 5)
    second = write_checkpoint(root, 5, TENSORS, {"later": True})
    assert second == below(root, "step-00000005-2")
    found = load_newest(root)
    assert found is not None
    assert found.data == {"later": True}


def test_the_manifest_is_that_of_a_local_checkpoint(store, root, tmp_path):
    write(root, 1)
    write(tmp_path, 1)
    body = store.get_object(Bucket="bucket", Key="runs/one/checkpoints/step-00000001-1/manifest.json")["Body"]
    assert json.loads(body.read()) == json.loads((tmp_path / "step-00000001-1" / "manifest.json").read_text())
