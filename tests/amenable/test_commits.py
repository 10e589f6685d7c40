"""What is committed when: stage.json before anything is thrown away, and nothing once another attempt took over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amenable import pipeline
from amenable.pipeline import ONLY_TO_CONTINUE, run_pipeline
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import STAGE_FILE, STARTED_FILE, StageSpec
from amenable.stages.context import Context, Finished, Stage
from corpus.problems import RunProblem


class Run:
    """A run of one stage, 'toy', whose body leaves checkpoints, weights and samples beside its result."""

    def __init__(self, root: Path) -> None:
        self.directory = RunDirectory(root)
        self.stage = root / "toy"
        self.bodies = 0
        self.in_body: Callable[[], None] = lambda: None
        self.found_before: list[str] = []

    def stages(self, recipe: Recipe, run: RunDirectory, sources: dict[str, str]) -> list[Stage]:
        return [Stage("toy", StageSpec("toy", self.stage, {"steps": 1}), self.body)]

    def body(self, context: Context, spec: StageSpec) -> Finished:
        self.bodies += 1
        self.found_before = sorted(path.name for path in self.stage.iterdir())
        for name in ONLY_TO_CONTINUE:
            (self.stage / name).mkdir(exist_ok=True)
            (self.stage / name / "large").write_text("what it continues from")
        (self.stage / "model").write_text("trained")
        self.in_body()
        return Finished([self.stage / "model"], {"loss": 1.0})

    def __call__(self) -> dict[str, Any]:
        recipe = Recipe.model_validate({"name": "toy", "run_directory": self.directory.root})
        return run_pipeline(recipe, until=None, progress=Progress(json=True), address=None)

    def to_continue_from(self) -> list[str]:
        return [name for name in ONLY_TO_CONTINUE if (self.stage / name / "large").exists()]

    def take_over(self) -> None:
        """Another attempt takes the lease."""
        path = self.directory.root / "run.lease"
        held = json.loads(path.read_text())
        path.write_text(json.dumps({**held, "epoch": held["epoch"] + 1, "pid": 4242, "host": "far-away"}))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(tmp_path / "run")
    monkeypatch.setattr(pipeline, "stages_of", run.stages)
    monkeypatch.setattr("evaluation.report.build_report", lambda root: run.directory.report.write_text("a report"))
    return run


def test_what_a_stage_continues_from_goes_once_it_is_done(run):
    assert set(ONLY_TO_CONTINUE) == {"checkpoints", "weights", "samples-partial"}
    run()
    assert (run.stage / STAGE_FILE).exists()
    assert (run.stage / "model").exists()
    assert not any((run.stage / name).exists() for name in ONLY_TO_CONTINUE)


def test_a_crash_before_the_commit_leaves_what_the_stage_continues_from(run, monkeypatch):
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "complete", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (run.stage / STAGE_FILE).exists()
    assert run.to_continue_from() == list(ONLY_TO_CONTINUE)
    run()
    assert run.found_before == sorted([*ONLY_TO_CONTINUE, "model", STARTED_FILE])
    assert run.to_continue_from() == []


def test_a_crash_just_after_the_commit_leaves_nothing_for_ever(run):
    run()
    (run.stage / "checkpoints").mkdir()
    (run.stage / "checkpoints" / "large").write_text("left by a command that was killed")
    assert run()["stages"]["toy"]["reused"]
    assert run.bodies == 1
    assert not (run.stage / "checkpoints").exists()


def taken_over(run: Run) -> None:
    with pytest.raises(RunProblem, match="taken over by process 4242 on far-away"):
        run()


def test_a_stage_is_not_committed_once_the_run_was_taken_over(run):
    run.in_body = run.take_over
    taken_over(run)
    assert not (run.stage / STAGE_FILE).exists()
    assert run.to_continue_from() == list(ONLY_TO_CONTINUE)
    assert not run.directory.lineage.exists()


def test_a_run_that_is_taken_over_while_large_files_are_hashed_does_not_commit_the_stage(run, monkeypatch):
    from amenable import stage_reuse

    hashed = stage_reuse._sha256_of_file

    def slowly(path: Path, *, sync: bool = False) -> str:
        run.take_over()
        return hashed(path, sync=sync)

    monkeypatch.setattr(stage_reuse, "_sha256_of_file", slowly)
    taken_over(run)
    assert not (run.stage / STAGE_FILE).exists()
    assert run.to_continue_from() == list(ONLY_TO_CONTINUE)


def test_lineage_is_not_written_once_the_run_was_taken_over(run, monkeypatch):
    removed = pipeline._remove_what_only_continues
    monkeypatch.setattr(pipeline, "_remove_what_only_continues", lambda *given: removed(*given) or run.take_over())
    taken_over(run)
    assert (run.stage / STAGE_FILE).exists()
    assert not run.directory.lineage.exists()


def test_summary_and_report_are_not_written_once_the_run_was_taken_over(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_lineage", lambda *_: run.take_over())
        taken_over(run)
    assert not run.directory.summary.exists()
    monkeypatch.setattr(RunDirectory, "write_summary", lambda *_: run.take_over())
    taken_over(run)
    assert not run.directory.report.exists()


def test_a_run_that_nobody_takes_over_writes_them_all(run):
    run()
    assert run.directory.lineage.exists()
    assert run.directory.summary.exists()
    assert run.directory.report.exists()


def test_the_sources_are_hashed_once_a_command(run, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline.data, "source_hashes", lambda recipe: calls.append(recipe) or {"a.jsonl": "5ha"})
    run()
    assert len(calls) == 1
    assert json.loads(run.directory.lineage.read_text())["data"] == {"a.jsonl": "5ha"}
