"""What should be served, and where the weights of a name lie."""

import json
import threading
from pathlib import Path

import pytest
import torch

from actors.published import DESIRED_FILE, PUBLISHED, PublishedFiles
from corpus.file_lock import file_lock
from corpus.problems import RunProblem, UsageProblem
from models.snapshot import Snapshot, pack
from serving import desired
from serving.desired import WishOvertaken, read_reports, read_wish, remove_report, write_report, write_wish
from serving.names import Names
from tests.serving.run_on_disk import commit, write_recipe, write_weights


def snapshot(update: int) -> Snapshot:
    return pack({"embed": torch.full((3, 2), float(update))}, (0, update))


def test_a_wish_is_counted_and_says_who_wanted_it(tmp_path):
    assert read_wish(tmp_path).counter == 0
    first = write_wish(tmp_path, "policy@12", 0, "ada", "now")
    assert (first.counter, read_wish(tmp_path)) == (1, first)
    assert write_wish(tmp_path, None, 1, "bob", "later").pinned is None


def test_who_has_not_seen_the_last_wish_changes_nothing(tmp_path):
    write_wish(tmp_path, "policy@12", 0, "ada", "now")
    with pytest.raises(WishOvertaken, match="ada has asked for policy@12 at now"):
        write_wish(tmp_path, None, 0, "bob", "later")
    assert read_wish(tmp_path).who == "ada"


def test_a_wish_that_another_process_keeps_from_being_written_is_told_of_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(desired, "LOCK_S", 0.2)
    write_wish(tmp_path, None, 0, "ada", "now")
    with (
        file_lock(tmp_path / "serving" / desired.LOCK_FILE, 1.0),
        pytest.raises(UsageProblem, match=r"was locked for 0\.2 s by process \d+"),
    ):
        write_wish(tmp_path, "policy@3", 1, "bob", "now")
    assert read_wish(tmp_path).who == "ada"
    assert write_wish(tmp_path, "policy@3", 1, "bob", "now").counter == 2


def test_of_many_at_once_one_is_taken(tmp_path):
    taken: list[str] = []

    def try_to(who: str) -> None:
        try:
            write_wish(tmp_path, "policy@1", 0, who, "now")
            taken.append(who)
        except WishOvertaken:
            pass

    threads = [threading.Thread(target=try_to, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert read_wish(tmp_path).who == taken[0]


@pytest.mark.parametrize("name", ["policy", "policy@", "policy@../../x", "policy@1/2", "policy@-1", "policy@01", "sft"])
def test_a_name_that_means_no_version_is_refused(tmp_path, name):
    with pytest.raises(UsageProblem, match="names no version"):
        write_wish(tmp_path, name, 0, "ada", "now")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 2}', '{"schema_version": 1, "counter": 1, "pinned": "../x"}']
)
def test_a_damaged_wish_is_told_of(tmp_path, content):
    (tmp_path / DESIRED_FILE).parent.mkdir()
    (tmp_path / DESIRED_FILE).write_text(content)
    with pytest.raises(RunProblem, match="cannot be read"):
        read_wish(tmp_path)


def test_replicas_report_until_they_end(tmp_path):
    write_report(tmp_path, "host-1", {"slots": []})
    assert read_reports(tmp_path) == {"host-1": {"slots": []}}
    with pytest.raises(ValueError, match="no id"):
        write_report(tmp_path, "../x", {})
    remove_report(tmp_path, "host-1")
    assert read_reports(tmp_path) == {}


@pytest.fixture
def run(tmp_path) -> Path:
    write_recipe(tmp_path)
    for epoch in ("epoch-01", "epoch-02"):
        write_weights(tmp_path / "sft" / epoch, epoch.encode())
    exports = [{"directory": "epoch-01", "valid_loss": 2.0}, {"directory": "epoch-02", "valid_loss": 1.0}]
    commit(tmp_path / "sft", {"exports": exports})
    write_weights(tmp_path / "round-01" / "ppo-init" / "export", b"init")
    commit(tmp_path / "round-01" / "ppo-init")
    return tmp_path


def test_names_mean_what_the_run_has_made_so_far(run):
    names = Names(run)
    assert set(names.all()) == {"sft", "reference"}
    sft = names.find("sft")
    assert sft is not None
    assert sft.directory == run / "sft" / "epoch-02"  # the best on validation, before one is selected
    (run / "round-01" / "select-sft").mkdir()
    (run / "round-01" / "select-sft" / "selection.json").write_text(json.dumps({"selected": "epoch-01"}))
    selected = names.find("sft")
    assert selected is not None
    assert selected.directory == run / "sft" / "epoch-01"
    assert selected.version != sft.version


def test_the_policy_is_what_was_published_and_then_the_export(run):
    names = Names(run)
    assert names.find("policy") is None
    files = PublishedFiles(run / PUBLISHED, "a", 3)
    files.save(snapshot(3))
    files.save(snapshot(4))
    newest, pinned = names.find("policy"), names.find("policy@3")
    assert newest is not None
    assert pinned is not None
    assert (newest.version, pinned.version) == ("0.4", "0.3")
    assert list(names.all())[-2:] == ["policy@4", "policy@3"]
    for name in ("policy", "ema"):
        write_weights(run / "round-01" / "ppo" / name, name.encode())
    assert names.find("policy").version == "0.4"  # pyright: ignore[reportOptionalMemberAccess]
    commit(run / "round-01" / "ppo")
    done, ema = names.find("policy"), names.find("policy-ema")
    assert done is not None
    assert ema is not None
    assert done.directory == run / "round-01" / "ppo" / "policy"
    assert done.version != ema.version


def test_damaged_weights_are_seen(run):
    weights = Names(run).find("reference")
    assert weights is not None
    weights.check()
    (run / "round-01" / "ppo-init" / "export" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RunProblem, match="damaged"):
        weights.check()


@pytest.mark.parametrize(
    "name", ["../sft", "policy@../../etc", "", "sft/epoch-01", "policy@999999999999", "\x00", "POLICY"]
)
def test_no_other_text_means_a_model(run, name):
    assert Names(run).find(name) is None


def test_a_run_without_a_model_says_so(tmp_path):
    write_recipe(tmp_path)
    with pytest.raises(RunProblem, match="no model yet"):
        Names(tmp_path).skeleton()
