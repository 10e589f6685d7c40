"""Which stages are reused, which are run again, and what is said about it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from amenable import stage_reuse
from amenable.stage_reuse import STAGE_FILE, StageSpec, begin, complete, done, read_record
from corpus.problems import RunProblem


@pytest.fixture
def base(tmp_path: Path) -> StageSpec:
    return finished(StageSpec("base", tmp_path / "base", {"steps": 10}), {"weights.bin": b"base weights"})


@pytest.fixture
def sft(base: StageSpec, tmp_path: Path) -> StageSpec:
    settings = {"epochs": 3, "optimizer": {"rate": 1e-3, "betas": (0.9, 0.95)}}
    spec = StageSpec("sft", tmp_path / "sft", settings, (base.directory,))
    return finished(spec, {"epoch-01/model.bin": b"one", "metrics.jsonl": b"{}\n"})


def finished(spec: StageSpec, files: dict[str, bytes]) -> StageSpec:
    begin(spec)
    for name, content in files.items():
        path = spec.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    complete(spec, [spec.directory], seconds=1.5, values={"loss": 2.5})
    return spec


def test_a_stage_that_is_unchanged_is_done_and_gives_back_what_it_found(sft):
    state = done(sft)
    assert state
    assert state.record is not None
    assert state.record.values == {"loss": 2.5}
    assert list(state.record.files) == ["epoch-01/model.bin", "metrics.jsonl"]
    assert state.record.files["epoch-01/model.bin"].size_bytes == 3


def test_a_stage_that_never_ran_is_not_done(tmp_path):
    spec = StageSpec("sft", tmp_path / "sft", {})
    assert done(spec).why == "sft: not done yet"
    assert not done(spec)
    assert begin(spec) == stage_reuse.Beginning(False, "sft: not done yet.")


def test_changed_settings_are_named(sft):
    settings = {"epochs": 16, "optimizer": {"rate": 1e-4, "betas": (0.9, 0.95)}, "dropout": 0.2}
    state = done(replace(sft, reads=settings))
    assert not state
    assert state.why == "sft: settings changed: dropout added (0.2), epochs 3 → 16, optimizer.rate 0.001 → 0.0001"


def test_many_changes_are_counted(sft):
    assert done(replace(sft, reads={"a": 1, "b": 2})).why == (
        "sft: settings changed: a added (1), b added (2), epochs removed (was 3) and 2 more"
    )


def test_the_order_of_settings_and_lists_for_tuples_change_nothing(sft):
    assert done(replace(sft, reads={"optimizer": {"betas": [0.9, 0.95], "rate": 1e-3}, "epochs": 3}))


def test_a_mutated_file_of_the_same_size_is_noticed(sft):
    (sft.directory / "epoch-01/model.bin").write_bytes(b"two")
    assert done(sft).why == "sft: its file epoch-01/model.bin changed after it was written"


def test_a_truncated_and_a_missing_file_are_noticed(sft):
    (sft.directory / "epoch-01/model.bin").write_bytes(b"o")
    assert done(sft).why == "sft: its file epoch-01/model.bin changed after it was written"
    (sft.directory / "epoch-01/model.bin").unlink()
    assert done(sft).why == "sft: its file epoch-01/model.bin is missing"


def test_a_file_the_stage_did_not_write_changes_nothing(sft):
    (sft.directory / "notes of mine.txt").write_text("keep")
    assert done(sft)


def test_a_parent_that_made_something_else_under_the_same_name_makes_the_child_stale(base, sft):
    (base.directory / "weights.bin").write_bytes(b"hand-edited!")
    complete(base, [base.directory], seconds=1.5, values={"loss": 2.5})
    assert done(base)
    assert done(sft).why == "sft: what it reads changed: base"


def test_a_parent_run_again_with_the_same_outcome_leaves_the_child_done(base, sft):
    complete(base, [base.directory], seconds=99, values={"loss": 2.5})
    assert done(sft)


def test_a_parent_whose_finding_changed_makes_the_child_stale(base, sft):
    complete(base, [base.directory], seconds=1.5, values={"loss": 2.4})
    assert not done(sft)


def test_another_version_of_the_program_makes_everything_stale(sft, base, monkeypatch):
    monkeypatch.setattr(stage_reuse, "CODE_SCHEMA", 2)
    assert done(base).why == "base: it was made by another version of the program (schema 1, now 2)"


def test_a_stage_of_another_name_does_not_count(base):
    assert done(replace(base, name="sft")).why == "sft: it was made by another stage (base)"


def test_a_stage_without_its_parent_says_what_it_needs(sft, base):
    (base.directory / STAGE_FILE).unlink()
    with pytest.raises(RunProblem, match="sft needs base to be complete"):
        done(sft)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "sft"}'])
def test_a_broken_stage_file_is_as_good_as_none(sft, content):
    (sft.directory / STAGE_FILE).write_text(content)
    assert done(sft).why == "sft: its stage.json cannot be read"


def test_a_stage_that_is_run_again_keeps_what_it_made_before(sft):
    (sft.directory / "notes of mine.txt").write_text("keep")
    changed = replace(sft, reads={**sft.reads, "epochs": 4})
    beginning = begin(changed)
    aside = sft.directory.parent / "set-aside/sft-1"
    assert not beginning.resumes
    assert beginning.set_aside == aside
    assert beginning.why == (
        f"sft: settings changed: epochs 3 → 4; it is run again, and what it made before is kept in {aside}."
    )
    assert (aside / "epoch-01/model.bin").read_bytes() == b"one"
    assert (aside / "notes of mine.txt").read_text() == "keep"
    assert not (sft.directory / STAGE_FILE).exists()
    assert not (sft.directory / "epoch-01").exists()
    assert begin(sft).set_aside is None, "it had only begun"
    (sft.directory / "checkpoint").write_text("step 3")
    assert begin(changed).set_aside == sft.directory.parent / "set-aside/sft-2"


def test_an_interrupted_stage_continues_with_the_same_inputs_only(base, tmp_path):
    spec = StageSpec("ppo", tmp_path / "ppo", {"rate": 1}, (base.directory,))
    begin(spec)
    (spec.directory / "checkpoint").write_text("update 17")
    assert not done(spec)
    assert begin(spec) == stage_reuse.Beginning(True, "ppo: continues where it was interrupted.")
    assert (spec.directory / "checkpoint").read_text() == "update 17"

    changed = begin(replace(spec, reads={"rate": 2}))
    assert not changed.resumes
    assert "ppo: it was interrupted, and its settings changed since: rate 1 → 2; it is run again" in changed.why
    assert not (spec.directory / "checkpoint").exists()


def test_an_interrupted_stage_whose_parent_changed_starts_anew(base, tmp_path):
    spec = StageSpec("ppo", tmp_path / "ppo", {"rate": 1}, (base.directory,))
    begin(spec)
    (spec.directory / "checkpoint").write_text("update 17")
    complete(base, [base.directory], seconds=1, values={"loss": 0})
    beginning = begin(spec)
    assert not beginning.resumes
    assert "it was interrupted, and what it reads changed since" in beginning.why


def test_a_damaged_stage_is_not_continued(sft):
    (sft.directory / "metrics.jsonl").unlink()
    beginning = begin(sft)
    assert not beginning.resumes
    assert "its file metrics.jsonl is missing; it is run again" in beginning.why


def test_the_commit_is_written_last_and_ends_the_start(sft):
    assert not (sft.directory / stage_reuse.STARTED_FILE).exists()
    record = json.loads((sft.directory / STAGE_FILE).read_text())
    assert STAGE_FILE not in record["files"]
    assert record["parents"].keys() == {"../base"}


def test_a_run_that_is_moved_elsewhere_stays_done(sft, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("base", "sft"):
        (tmp_path / name).rename(moved / name)
    assert done(replace(sft, directory=moved / "sft", parents=(moved / "base",)))


def test_a_stage_cannot_claim_files_that_are_missing_or_elsewhere(sft, tmp_path):
    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(RunProblem, match="should have written"):
        complete(sft, [sft.directory / "model"], 1, {})
    with pytest.raises(RunProblem, match="is not in its directory"):
        complete(sft, [tmp_path / "elsewhere"], 1, {})


def test_a_finding_that_is_not_a_number_is_refused(sft):
    with pytest.raises(RunProblem, match="NaN or infinite"):
        complete(sft, [sft.directory], 1, {"loss": float("nan")})
    assert read_record(sft.directory) is not None
