"""A run that an object store keeps: what one machine did is there for the next, whose disk is empty."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from amenable import interruption, pipeline
from amenable.cli import app
from amenable.pipeline import run_pipeline
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished, Stage
from corpus.problems import RunProblem, UsageProblem
from corpus.working_copies import WORKING_COPIES
from learners.checkpoint import load_newest, write_checkpoint
from learners.checkpoint_place import checkpoints_of

pytest_plugins = ["tests.object_store"]


class Run:
    """A run of two stages, 'first' and 'second', which copies and extends what the first made, in `steps` steps."""

    def __init__(self, address: str, monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
        self.address, self._monkeypatch, self._machine = address, monkeypatch, machine
        self.bodies: list[str] = []
        self.steps: list[int] = []
        self.settings = {"steps": 3}
        self.at_step: Callable[[int], None] = lambda step: None
        self.move_to(machine)

    def move_to(self, machine: Path) -> None:
        """From now on the run is on another machine."""
        self._monkeypatch.setenv(WORKING_COPIES, str(machine))

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.address)

    def stages(self, recipe: Recipe, run: RunDirectory, sources: dict[str, str]) -> list[Stage]:
        first, second = run.root / "first", run.root / "round-01" / "second"
        return [
            Stage("first", StageSpec("first", first, {}), self.first),
            Stage("second", StageSpec("second", second, self.settings, (first,)), self.second),
        ]

    def first(self, context: Context, spec: StageSpec) -> Finished:
        self.bodies.append("first")
        (spec.directory / "model").write_text("first")
        return Finished([spec.directory / "model"], {"loss": 1.0})

    def second(self, context: Context, spec: StageSpec) -> Finished:
        self.bodies.append("second")
        stored = context.run.stored
        assert stored is not None
        root = checkpoints_of(spec.directory, stored)
        found = load_newest(root)
        log = spec.directory / "metrics.jsonl"
        for step in range(0 if found is None else found.step, self.settings["steps"]):
            self.steps.append(step + 1)
            with log.open("a") as stream:
                stream.write(f"{step + 1}\n")
            stored.push(context.check_lease)
            write_checkpoint(root, step + 1, {"weights": {"a": torch.full((2,), step + 1.0)}}, {})
            self.at_step(step + 1)
        content = (context.run.root / "first" / "model").read_text() + log.read_text()
        (spec.directory / "model").write_text(content)
        return Finished([spec.directory / "model", log], {"loss": 2.0})

    def __call__(self) -> dict[str, Any]:
        recipe = Recipe.model_validate({"name": "toy", "run_directory": self.address})
        return run_pipeline(recipe, until=None, progress=Progress(json=True), address=None)


@pytest.fixture
def run(store, query, tmp_path, monkeypatch):
    run = Run(f"s3://bucket/runs/toy{query}", monkeypatch, tmp_path / "machine-1")
    monkeypatch.setattr(pipeline, "stages_of", run.stages)
    monkeypatch.setattr("evaluation.report.build_report", write_report)
    return run


def write_report(root: Path) -> Path:
    (root / "report.html").write_text("a report")
    return root / "report.html"


DONE = [
    "first/model",
    "first/stage.json",
    "lineage.json",
    "recipe.yaml",
    "report.html",
    "round-01/second/metrics.jsonl",
    "round-01/second/model",
    "round-01/second/stage.json",
    "summary.json",
]


def kept(keys_in) -> list[str]:
    names = [name.removeprefix("runs/toy/") for name in keys_in("runs/toy/")]
    return [name for name in names if not name.startswith("leases/")]


def test_all_of_a_run_is_in_the_store_and_a_second_machine_reuses_it(run, keys_in, tmp_path):
    run()
    assert kept(keys_in) == DONE
    run.move_to(tmp_path / "machine-2")
    summary = run()
    assert [stage["reused"] for stage in summary["stages"].values()] == [True, True]
    assert run.bodies == ["first", "second"]
    assert kept(keys_in) == DONE
    assert (run.directory.root / "round-01" / "second" / "model").read_text() == "first1\n2\n3\n"
    assert summary["run_directory"] == run.address


@pytest.mark.parametrize("ending", ["killed", "interrupted", "failed"])
def test_a_run_that_ended_goes_on_elsewhere_from_its_newest_checkpoint(run, keys_in, tmp_path, ending):
    class Killed(BaseException):
        pass

    raised = {
        "killed": Killed(),
        "interrupted": interruption.Interrupted("second, step 2 of 3"),
        "failed": RunProblem("a generator died", "run/unexpected"),
    }[ending]

    def end(step: int) -> None:
        if step == 2:
            raise raised

    run.at_step = end
    with pytest.raises(type(raised)):
        run()
    assert "first/stage.json" in kept(keys_in)
    assert "round-01/second/stage.json" not in kept(keys_in)
    run.at_step = lambda step: None
    shutil.rmtree(tmp_path / "machine-1")
    run.move_to(tmp_path / "machine-2")
    run()
    assert run.bodies == ["first", "second", "second"]
    assert run.steps == [1, 2, 3]
    assert kept(keys_in) == DONE
    assert (run.directory.root / "round-01" / "second" / "model").read_text() == "first1\n2\n3\n"


def test_a_machine_that_comes_back_with_an_old_copy_takes_what_the_store_holds(run, keys_in, tmp_path):
    run()
    run.move_to(tmp_path / "machine-2")
    run.settings = {"steps": 4}
    run()
    run.move_to(tmp_path / "machine-1")
    run()
    assert run.bodies == ["first", "second", "second"]
    assert (run.directory.root / "round-01" / "second" / "model").read_text() == "first1\n2\n3\n4\n"
    aside = [name for name in kept(keys_in) if "set-aside" in name]
    assert aside == [f"round-01/set-aside/second-1/{name}" for name in ("metrics.jsonl", "model", "stage.json")]


def test_files_that_were_lost_in_the_store_are_made_again(run, store, keys_in, tmp_path):
    run()
    store.delete_object(Bucket="bucket", Key="runs/toy/round-01/second/model")
    run.move_to(tmp_path / "machine-2")
    run()
    assert run.bodies == ["first", "second", "second"]
    assert "round-01/second/model" in kept(keys_in)


def test_a_pinned_checkpoint_outlives_its_stage(run, store, keys_in):
    def pin(step: int) -> None:
        if step == 1:
            name = "runs/toy/round-01/second/checkpoints/step-00000001-1/pinned"
            store.put_object(Bucket="bucket", Key=name, Body=b"")

    run.at_step = pin
    run()
    found = {name.split("/")[3] for name in kept(keys_in) if "/checkpoints/" in name}
    assert found == {"step-00000001-1"}


def test_an_attempt_that_was_taken_over_writes_nothing_more(run, store, keys_in):
    def take_over(step: int) -> None:
        holder = {"host": "far-away", "pid": 4242, "process": "b/n/1", "started": "now", "epoch": 9, "held": True}
        body = json.dumps(holder).encode()
        store.put_object(Bucket="bucket", Key="runs/toy/leases/epoch-000009-abc.json", Body=body)

    run.at_step = take_over
    with pytest.raises(RunProblem, match="runs/toy was taken over by process 4242 on far-away"):
        run()
    assert "round-01/second/stage.json" not in kept(keys_in)
    assert "summary.json" not in kept(keys_in)


def test_a_place_with_other_objects_is_refused_and_left_alone(run, store, keys_in):
    store.put_object(Bucket="bucket", Key="runs/toy/thesis.tex", Body=b"years of work")
    with pytest.raises(UsageProblem, match=r"^s3://bucket/runs/toy holds files that are not a run's"):
        run()
    assert kept(keys_in) == ["thesis.tex"]


def test_a_store_that_cannot_be_used_is_told_before_anything_is_started(run, query):
    run.address = f"s3://nowhere/runs/toy{query}"
    with pytest.raises(UsageProblem, match=r"^s3://nowhere/runs/toy cannot be written to \(.*NO_SUCH_BUCKET"):
        run()
    assert run.bodies == []


def test_the_report_is_written_again_without_the_models_and_where_the_run_is(run, store, keys_in, monkeypatch):
    run()
    store.delete_object(Bucket="bucket", Key="runs/toy/report.html")
    seen = []

    def build(root: Path) -> Path:
        seen.extend(sorted(path.name for path in root.iterdir()))
        return write_report(root)

    monkeypatch.setattr("evaluation.report.build_report", build)
    ended = CliRunner().invoke(app, ["report", run.address])
    assert ended.exit_code == 0, ended.output
    assert ended.output == "Report: s3://bucket/runs/toy/report.html\n"
    assert "lineage.json" in seen
    assert kept(keys_in) == DONE
    ended = CliRunner().invoke(app, ["report", run.address.replace("/toy", "/absent")])
    assert ended.exit_code == 2
    assert "There is no run in s3://bucket/runs/absent" in ended.output


def test_the_working_copy_of_an_address_is_always_the_same_and_no_others(run, query, monkeypatch, tmp_path):
    monkeypatch.setenv(WORKING_COPIES, str(tmp_path))
    root = RunDirectory(f"s3://bucket/runs/toy{query}").root
    assert root.parent == tmp_path
    assert root.name.startswith("toy-")
    assert RunDirectory(f"s3://bucket/runs/toy/{query}").root == root
    assert RunDirectory(f"s3://other/runs/toy{query}").root != root
    assert RunDirectory("s3://bucket/runs/toy").root != root
    monkeypatch.delenv(WORKING_COPIES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert RunDirectory(f"s3://bucket/runs/toy{query}").root == tmp_path / "cache" / "amenable" / "runs" / root.name


def test_a_recipe_keeps_the_address_as_it_was_given(query):
    given = f"s3://bucket/runs/toy{query}"
    assert Recipe.model_validate({"name": "toy", "run_directory": given}).run_directory == given
    assert Recipe.model_validate({"name": "toy"}).run_directory == "runs/toy"
    assert Recipe.model_validate({"name": "toy", "run_directory": Path("a/b")}).run_directory == "a/b"
