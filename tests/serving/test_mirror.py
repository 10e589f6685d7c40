"""What a service reads of a run in an object store: what comes, when, how often, and what a damaged store leaves."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from corpus.problems import RunProblem
from corpus.working_copies import WORKING_COPIES, mirror, working_copy
from models.snapshot import pack, unpack
from serving import mirror as mirror_module
from serving.feeds import PublishedFeed
from serving.mirror import Mirror
from serving.served_run import ServedRun
from serving.slots import Slots
from tests.serving.run_on_disk import commit, write_recipe, write_weights
from tests.serving.stored_run import objects, publish_stored, push
from tests.serving.test_slots import StandInSlot

pytest_plugins = ["tests.object_store"]


@pytest.fixture
def address(store, query):
    return f"s3://bucket/runs/one{query}"


@pytest.fixture
def trained(tmp_path, address) -> Path:
    """The working copy of the machine that trains; SFT and PPO's beginning are done and in the store."""
    root = tmp_path / "trains"
    write_recipe(root)
    (root / "data" / "tokenizer").mkdir(parents=True)
    (root / "data" / "tokenizer" / "tokenizer.json").write_text("{}")
    (root / "data" / "prompts-ppo.parquet").write_text("of no use here")
    commit(root / "data")
    write_weights(root / "sft" / "epoch-01", b"sft")
    (root / "sft" / "metrics.jsonl").write_text("{}\n")
    commit(root / "sft", {"exports": [{"directory": "epoch-01", "valid_loss": 1.0}]})
    write_weights(root / "round-01" / "ppo-init" / "export", b"init")
    commit(root / "round-01" / "ppo-init")
    push(root, address)
    return root


@pytest.fixture
def served(address, tmp_path) -> ServedRun:
    root = tmp_path / "serves"
    return ServedRun(address, root, Mirror(address, root))


def publish(trained: Path, address: str, update: int, attempt: int = 0, kept: int = 3) -> None:
    snapshot = pack({"embed": torch.full((3, 2), float(update))}, (attempt, update))
    publish_stored(trained, address, snapshot, kept)


def files(root: Path) -> list[str]:
    below = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return [name for name in below if not name.startswith(".mirror/")]


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the objects that come, in their order."""
    names, real = [], mirror_module.fetch

    def fetch(filesystem: Any, inner: str, target: Path) -> str:
        names.append(inner.removeprefix("bucket/runs/one/"))
        return real(filesystem, inner, target)

    monkeypatch.setattr(mirror_module, "fetch", fetch)
    return names


def test_all_but_weights_comes_at_a_look_and_weights_when_they_are_checked(trained, served, fetched):
    served.look()
    assert files(served.root) == [
        "data/stage.json",
        "data/tokenizer/tokenizer.json",
        "recipe.yaml",
        "round-01/ppo-init/export/config.json",
        "round-01/ppo-init/stage.json",
        "sft/epoch-01/config.json",
        "sft/metrics.jsonl",
        "sft/stage.json",
    ]
    assert served.names.recipe()["name"] == "toy"
    assert set(served.names.all()) == {"sft", "reference"}
    reference = served.names.find("reference")
    assert reference is not None
    assert reference.files() == []
    reference.check()
    assert [path.read_bytes() for path in reference.files()] == [b"init"]
    assert served.names.whole_skeleton() == served.root / "round-01" / "ppo-init" / "export"
    assert fetched.count("round-01/ppo-init/export/model.safetensors") == 1


def test_a_snapshot_is_known_by_its_manifest_and_comes_once(trained, served, address, fetched):
    served.look()
    publish(trained, address, 1)
    publish(trained, address, 2)
    served.look()
    assert list(served.names.all())[-2:] == ["policy@2", "policy@1"]
    newest = served.names.find("policy")
    assert newest is not None
    assert newest.version == "0.2"
    for _ in range(2):
        newest.check()
    assert fetched.count("published/0.2/weights.safetensors") == 1
    assert "published/0.1/weights.safetensors" not in fetched
    assert newest.snapshot is not None
    assert dict(unpack(newest.snapshot.load()))["embed"][0, 0] == 2
    pinned = served.names.find("policy@1")
    assert pinned is not None
    pinned.check()
    assert fetched.count("published/0.1/weights.safetensors") == 1


def test_what_is_retired_in_the_store_goes_here(trained, served, address):
    publish(trained, address, 1, kept=1)
    served.look()
    served.names.find("policy").check()
    publish(trained, address, 2, kept=1)
    served.look()
    assert [name for name in files(served.root) if name.startswith("published/")] == ["published/0.2/manifest.json"]
    assert served.names.find("policy@1") is None
    assert [path for path in (served.root / ".mirror").rglob("*") if "0.1" in str(path)] == []


def test_only_what_is_new_travels(trained, served, address, fetched):
    publish(trained, address, 1)
    served.look()
    fetched.clear()
    served.look()
    assert fetched == []
    publish(trained, address, 2)
    with open(trained / "sft" / "metrics.jsonl", "a") as stream:
        stream.write("{}\n")
    push(trained, address)
    served.look()
    assert fetched == ["published/0.2/manifest.json", "sft/metrics.jsonl"]


def test_replicas_of_a_machine_share_looks_and_files(trained, served, address, fetched):
    publish(trained, address, 1)
    other = ServedRun(address, served.root, Mirror(address, served.root))
    served.look()
    fetched.clear()
    other.look(60.0)  # the first one's look will do
    assert fetched == []
    threads = [threading.Thread(target=each.names.find("policy").check) for each in (served, other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert fetched == ["published/0.1/weights.safetensors"]


@pytest.mark.usefixtures("trained")
def test_what_arrives_for_another_process_is_left_alone_and_what_no_record_names_goes(served):
    export = served.root / "round-01" / "ppo-init" / "export"
    export.mkdir(parents=True)
    (export / "model.safetensors.partial").write_bytes(b"in")
    (export / "former.safetensors").write_bytes(b"old")
    served.look()
    assert (export / "model.safetensors.partial").read_bytes() == b"in"
    assert not (export / "former.safetensors").exists()


def test_another_process_that_does_not_end_is_named(trained, served, monkeypatch):
    monkeypatch.setattr(mirror_module, "LOOK_DEADLINE_S", 0.1)
    other = Mirror(served.place, served.root)
    with (
        other._locked("look", "to look", 1),
        pytest.raises(RunProblem, match=r"Waited 0 s for another process to look at the store into .* and gave up"),
    ):
        served.look()


def damage(path: Path) -> bytes:
    """Other bytes of the same length; returns what was there."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


@pytest.mark.parametrize("name", ["policy@1", "sft"])
def test_what_the_disk_has_damaged_is_fetched_anew_once(trained, served, address, fetched, name):
    publish(trained, address, 1)
    served.look()
    weights = served.names.find(name)
    weights.check()
    [path] = weights.files()
    whole = damage(path)
    fetched.clear()
    weights.check()
    assert path.read_bytes() == whole
    assert fetched == [path.relative_to(served.root).as_posix()]
    weights.check()
    assert len(fetched) == 1


def test_a_disk_that_damages_whatever_comes_is_told_of(trained, served, monkeypatch):
    served.look()
    weights = served.names.find("sft")
    real, turns = mirror_module.Mirror._bring, []

    def bring(self: Mirror, name: str, sha256: str | None = None) -> None:
        real(self, name, sha256)
        turns.append(name)
        damage(self.root / name)

    monkeypatch.setattr(Mirror, "_bring", bring)
    with pytest.raises(RunProblem, match=r"is damaged: .* It was fetched a moment ago: look at the disk of this"):
        weights.check()
    assert len(turns) == 2


def test_what_is_damaged_here_and_in_the_store_has_no_name_here(trained, served, store):
    served.look()
    weights = served.names.find("sft")
    weights.check()
    damage(weights.files()[0])
    store.put_object(Bucket="bucket", Key="runs/one/sft/epoch-01/model.safetensors", Body=b"sfx")
    with pytest.raises(RunProblem, match=r"^s3://bucket/runs/one/sft/epoch-01/model\.safetensors is damaged"):
        weights.check()
    assert weights.files() == []


def test_who_finds_a_file_damaged_that_another_has_fetched_meanwhile_leaves_it(trained, served, address, fetched):
    served.look()
    weights = served.names.find("sft")
    weights.check()
    [path] = weights.files()
    damage(path)
    weights.check()
    fetched.clear()
    [(_, sha256)] = weights.hashes
    served.mirror.fetch(path, sha256, damaged=True)
    assert fetched == []


def test_a_model_that_engines_begin_from_or_that_scores_is_checked_too(trained, served, address, fetched):
    write_weights(trained / "round-01" / "rm" / "export", b"rm")
    commit(trained / "round-01" / "rm")
    push(trained, address)
    served.look()
    for directory in (served.names.whole_skeleton, served.names.whole_reward_model):
        path = directory() / "model.safetensors"
        whole = damage(path)
        assert directory() == path.parent
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_snapshot_is_told_of_and_has_no_name_here(trained, served, address, store, damage):
    publish(trained, address, 1)
    key = "runs/one/published/0.1/weights.safetensors"
    content = store.get_object(Bucket="bucket", Key=key)["Body"].read()
    if damage == "gone":
        store.delete_object(Bucket="bucket", Key=key)
    else:
        store.put_object(Bucket="bucket", Key=key, Body=content[:-1] + (b"" if damage == "cut" else b"\xff"))
    served.look()
    weights = served.names.find("policy")
    said = "could not be brought" if damage == "gone" else r"0\.1/weights\.safetensors is damaged"
    with pytest.raises(RunProblem, match=said):
        weights.check()
    assert [name for name in files(served.root) if "published" in name] == ["published/0.1/manifest.json"]
    store.put_object(Bucket="bucket", Key=key, Body=content)
    weights.check()  # it is whole again


def test_a_damaged_file_of_a_stage_keeps_its_record_away(trained, served, address, store):
    key = "runs/one/sft/epoch-01/config.json"
    content = store.get_object(Bucket="bucket", Key=key)["Body"].read()
    store.put_object(Bucket="bucket", Key=key, Body=b"{}")
    publish(trained, address, 1)
    with pytest.raises(RunProblem, match=r"^s3://bucket/runs/one/sft/epoch-01/config\.json is damaged"):
        served.look()
    assert served.names.find("sft") is None
    assert served.names.find("policy@1") is not None  # what is published is followed all the same
    store.put_object(Bucket="bucket", Key=key, Body=content)
    served.look()
    assert served.names.find("sft") is not None


def test_a_stage_that_is_made_anew_is_another_model(trained, served, address):
    served.look()
    before = served.names.find("sft")
    before.check()
    (trained / "sft" / "stage.json").unlink()
    push(trained, address)
    served.look()
    assert served.names.find("sft") is None  # it is under way
    (trained / "sft" / "epoch-01" / "model.safetensors").rename(trained / "sft" / "epoch-01" / "a.safetensors")
    (trained / "sft" / "epoch-01" / "a.safetensors").write_bytes(b"other")
    commit(trained / "sft", {"exports": [{"directory": "epoch-01", "valid_loss": 1.0}]})
    push(trained, address)
    served.look()
    after = served.names.find("sft")
    after.check()
    assert after.version != before.version
    assert [path.read_bytes() for path in after.files()] == [b"other"]  # nothing of the former model beside it


def test_a_record_that_leads_out_of_the_mirror_is_refused(trained, served, store):
    record = json.dumps({"files": {"epoch-01/../../../x.json": {"size_bytes": 1, "sha256": "0" * 64}}})
    store.put_object(Bucket="bucket", Key="runs/one/sft/stage.json", Body=record.encode())
    store.put_object(Bucket="bucket", Key="runs/one/x.json", Body=b"x")
    with pytest.raises(RunProblem, match="which is no file of a run"):
        served.look()


def test_the_mirror_is_no_working_copy_and_says_where_the_run_is(address, monkeypatch, tmp_path):
    monkeypatch.setenv(WORKING_COPIES, str(tmp_path))
    run = ServedRun.of(address)
    assert run.root == mirror(address) == tmp_path / "served" / working_copy(address).name
    assert (run.name, run.title) == ("s3://bucket/runs/one", "one")
    assert ServedRun.of(str(tmp_path)) == ServedRun(tmp_path, tmp_path, None)


def test_a_store_that_is_away_stops_nothing_and_is_told_of(trained, served, address, monkeypatch):
    async def scene() -> None:
        served.look()
        slot = StandInSlot(0, "policy")
        slot.version = "0.1"
        names = served.names
        slots = Slots(served.root, [slot], names, PublishedFeed(names), 0.01, served.look)  # pyright: ignore
        publish(trained, address, 2)
        with monkeypatch.context() as patch:
            patch.setattr(Mirror, "_listed", away)
            await slots.follow_once()
            assert (slot.version, "the store is away" in slots.problem) == ("0.1", True)
        await slots.follow_once()
        assert (slot.version, slots.problem) == ("0.2", None)

    def away(*_: object) -> None:
        raise OSError("the store is away")

    asyncio.run(scene())


def test_weights_that_were_removed_before_they_came_are_looked_for_again(trained, served, address, store):
    publish(trained, address, 1, kept=1)
    served.look(60.0)
    weights = served.names.find("policy")
    publish(trained, address, 2, kept=1)
    with pytest.raises(RunProblem, match="could not be brought"):
        weights.check()
    served.look(60.0)  # not a minute later, and done all the same
    assert served.names.find("policy").version == "0.2"


def test_what_people_keep_on_one_machine_is_there_on_another(trained, served, address, store, tmp_path):
    other = ServedRun(address, tmp_path / "other", Mirror(address, tmp_path / "other"))
    kept = served.root / "serving" / "comparisons" / f"{'a' * 24}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    served.keep(kept)
    for run in (served, other):
        run.look()
        assert (run.root / kept.relative_to(served.root)).read_text() == "{}"
    store.delete_object(Bucket="bucket", Key=f"runs/one/serving/comparisons/{kept.name}")
    for run in (served, other):
        run.look()
        assert not (run.root / kept.relative_to(served.root)).exists()


def test_a_session_that_was_ended_is_over_on_every_machine(trained, served, store, tmp_path):
    sessions, soon = served.sessions, int(time.time()) + 60
    assert sessions is not None
    sessions.end("a" * 32, str(soon))
    sessions.end("b" * 32, "1")
    for _ in range(2):
        served.look()
    assert (served.root / "serving" / "ended-sessions").read_text() == f"{'a' * 32} {soon}\n"
    assert objects(store, "runs/one/serving/ended-sessions/") == [f"{'a' * 32}-{soon}"]
