"""The command as a person meets it: answers, sentences, exit codes. The pipeline is a stand-in with the same face."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from typer.testing import CliRunner

from amenable.cli import app
from amenable.interruption import Interrupted
from amenable.run_directory import RunDirectory
from amenable.summary import Summary
from corpus.problems import RunProblem, UsageProblem
from evaluation import results as evaluation_results
from evaluation.schema import Comparison, ModelResult, Results, write_results
from evaluation.win_rate import WinRate


class SmallRecipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    run_directory: Path = Path("runs/small")
    seed: int = 0


RATE = WinRate(rate=0.612, low=0.581, high=0.643, samples=400, prompts=100)
EVEN = WinRate(rate=0.55, low=0.52, high=0.58, samples=400, prompts=100)
MODEL = ModelResult(gold=0.7, reward=1.2, length=11.5, kl=1.5, eos_rate=0.99)
RESULTS = Results(
    synthetic=True,
    samples_per_prompt=2,
    prompts=100,
    models={"sft": MODEL, "ppo": MODEL},
    comparisons=[Comparison(model="ppo", against="sft", judge="gold", raw=RATE, length_controlled=EVEN)],
    side_by_side=[],
)
REWARD_MODEL = {
    "accuracy": {"rate": 0.68, "low": 0.64, "high": 0.72, "pairs": 1234},
    "baselines": {"longer reply wins": {"rate": 0.51, "low": 0.47, "high": 0.55, "pairs": 1234}},
}
ROWS = {"scored": 600, "long_prompts": 34, "cut_responses": 0}


class StandIn:
    """A pipeline that notes how it was called and does what the test tells it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.does: Any = lambda recipe, progress: None
        self.evaluated = True

    def run_pipeline(self, recipe: SmallRecipe, *, until: str | None, progress, address: str | None, variables) -> dict:
        self.calls.append({"recipe": recipe, "until": until, "address": address, "variables": variables})
        progress.plan(["sft", "ppo"])
        progress.stage("sft")
        self.does(recipe, progress)
        progress.finish_stage({"loss": 1.5})
        run = RunDirectory(recipe.run_directory)
        base = {
            "run": recipe.name,
            "run_directory": str(recipe.run_directory),
            "synthetic": True,
            "until": until,
            "stages": {"sft": {"reused": False, "seconds": 72.0, "values": {"loss": 1.23456}}},
        }
        if until is not None or not self.evaluated:
            return {**base, "seconds": {"sft": 72.0}}
        path = run.round(1).evaluation / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(RESULTS, path)
        found = evaluation_results.summary(RESULTS, run=recipe.name, seconds={"sft": 72.0})
        return {**base, **found, "report": "report.html"}

    def score_comparisons(self, recipe: SmallRecipe, comparisons: str, *, progress, address: str | None) -> dict:
        self.calls.append({"recipe": recipe, "comparisons": comparisons, "address": address})
        return {"rows": ROWS, "reward_model": REWARD_MODEL}


@pytest.fixture
def pipeline(monkeypatch, tmp_path: Path) -> StandIn:
    stand_in = StandIn()
    module = types.ModuleType("amenable.pipeline")
    module.run_pipeline = stand_in.run_pipeline  # type: ignore[attr-defined]
    module.score_comparisons = stand_in.score_comparisons  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amenable.pipeline", module)
    recipe = types.ModuleType("amenable.recipe")
    recipe.Recipe = SmallRecipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amenable.recipe", recipe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text("name: small\n")
    return stand_in


def amenable(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_run_ends_with_a_table_and_the_path_of_the_report(pipeline):
    ended = amenable("run", "small.yaml", "seed=7", "--address", "auto")
    assert ended.exit_code == 0, ended.output
    call = pipeline.calls[0]
    assert (call["recipe"].seed, call["until"], call["address"]) == (7, None, "auto")
    assert "[1 of 2] sft: done in" in ended.stdout
    assert "Synthetic results: a program stood in for the people." in ended.stdout
    row = next(line for line in ended.stdout.splitlines() if line.startswith("ppo"))
    assert "61.2% [58.1, 64.3]" in row
    assert "beat the supervised baseline's (SFT) in 61.2 %" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "Report: runs/small/report.html"


@pytest.mark.parametrize("stage", ["sft", "collect", "rm", "ppo", "eval"])
def test_each_stage_is_a_command_that_ends_after_it(pipeline, stage):
    ended = amenable(stage, "small.yaml")
    assert ended.exit_code == 0, ended.output
    assert pipeline.calls[0]["until"] == stage


def test_a_run_without_an_evaluation_ends_with_its_stages(pipeline):
    ended = amenable("sft", "small.yaml")
    assert "1 min 12 s" in ended.stdout
    assert "loss 1.235" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "Run directory: runs/small"


def test_run_directory_can_be_given_on_the_command_line_whatever_its_name(pipeline, tmp_path):
    for name in ("else where", "007", "null", "a: b", 'q"uote', "naïve", "emoji😀"):
        assert amenable("run", "small.yaml", "--run", name).exit_code == 0
        assert pipeline.calls[-1]["recipe"].run_directory == Path(name)


def test_json_is_one_answer_on_standard_output_with_documented_keys(pipeline):
    def prints(recipe, progress):
        print("a library prints")

    pipeline.does = prints
    ended = amenable("run", "small.yaml", "--json")
    assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    assert Summary.model_validate(answer).model_dump(mode="json") == answer
    assert answer["learned"] is True
    assert answer["win_rates"]["ppo_vs_sft"]["gold"]["raw"]["low"] == 0.581
    assert "a library prints" in ended.stderr
    assert "[1 of 2] sft: started" in ended.stderr


def test_every_key_of_the_evaluations_summary_is_documented_here():
    assert set(evaluation_results.summary(RESULTS)) <= set(Summary.model_fields)


class RayActorError(Exception):
    """Named and placed as Ray's, which the command does not import."""


RayActorError.__module__ = "ray.exceptions"


def fails(with_error: BaseException):
    def do(recipe, progress):
        progress.update(17, 48, "updates")
        raise with_error

    return do


@pytest.mark.parametrize(
    ("error", "code", "kind", "says", "error_code"),
    [
        (
            UsageProblem("train.jsonl, line 3: no prompt.", "data/row"),
            2,
            "usage",
            "train.jsonl, line 3: no prompt.",
            "data/row",
        ),
        (
            RunProblem("The loss is NaN at step 3.", "run/unexpected"),
            1,
            "run",
            "The loss is NaN at step 3.",
            "run/unexpected",
        ),
        (
            RayActorError("The actor died unexpectedly.\n\tclass_name: RolloutGenerator\n\tactor_id: 5f"),
            1,
            "run",
            "A generator died: its process was killed or crashed; the same command continues from what was last saved.",
            "run/process-died",
        ),
        (
            Interrupted("ppo, update 17 of 48"),
            130,
            "interrupted",
            "Interrupted at ppo, update 17 of 48; the same command continues.",
            "",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted",
            "Stopped at once at sft, 17 of 48 updates; the same command continues from what was last saved.",
            "",
        ),
    ],
)
def test_a_run_that_cannot_go_on_says_one_sentence_and_its_exit_code(pipeline, error, code, kind, says, error_code):
    pipeline.does = fails(error)
    ended = amenable("run", "small.yaml")
    assert ended.exit_code == code
    told = f"{says} [{error_code}]" if error_code else says
    assert ended.stderr == told + "\n"
    assert says not in ended.stdout

    ended = amenable("run", "small.yaml", "--json")
    assert ended.exit_code == code
    coded = {"code": error_code} if error_code else {}
    assert json.loads(ended.stdout) == {"problem": says, "kind": kind} | coded
    assert ended.stderr.endswith(told + "\n")


def test_a_mistake_of_the_program_flies_with_its_traceback(pipeline):
    pipeline.does = fails(ZeroDivisionError("a bug"))
    ended = amenable("run", "small.yaml")
    assert ended.exit_code == 1
    assert isinstance(ended.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["small.yaml", "sed=7"], "Command line: there is no key 'sed'; did you mean 'seed'?"),
        (["small.yaml", "seed=x"], "Command line: seed must be a whole number, but the text 'x' was given."),
        (["smal.yaml"], "There is no recipe file 'smal.yaml'; "),
        (["small.yaml", "seed"], "Command line: 'seed' is not an override; write key=value"),
    ],
)
def test_a_wrong_recipe_ends_before_anything_begins(pipeline, tmp_path, arguments, says):
    ended = amenable("run", *arguments)
    assert ended.exit_code == 2
    assert ended.stderr.startswith(says)
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert pipeline.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_file_of_comparisons_is_scored_with_the_trained_reward_model(pipeline, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    ended = amenable("eval", "small.yaml", "--comparisons", "pairs.jsonl")
    assert ended.exit_code == 0, ended.output
    assert "reward model" in ended.stdout
    assert "68.0% [64.0, 72.0]" in ended.stdout
    assert "51.0% [47.0, 55.0]" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "Accuracy on the 1,234 pairs of pairs.jsonl, with 95 % intervals."

    answer = json.loads(amenable("eval", "small.yaml", "--comparisons", "pairs.jsonl", "--json").stdout)
    assert answer == {"run": "small", "comparisons": "pairs.jsonl", "rows": ROWS, "reward_model": REWARD_MODEL}


def test_the_report_of_a_run_is_written_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("runs/small")
    run.create()
    run.write_recipe(SmallRecipe(name="small"))
    ended = amenable("report", "small")
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == "Report: runs/small/report.html\n"
    assert "<html" in run.report.read_text()
    assert json.loads(amenable("report", "runs/small", "--json").stdout) == {"report": str(run.report)}

    ended = amenable("report", "../../etc")
    assert ended.exit_code == 2
    assert (
        ended.stderr
        == "There is no run in ../../etc; name the directory of a run, such as runs/demo. [run/not-found]\n"
    )


def test_a_report_of_no_name_is_told_so():
    ended = amenable("report", "")
    assert ended.exit_code == 2
    assert (
        ended.stderr
        == "The name of the run is empty; name the directory of a run, such as runs/demo. [run/not-found]\n"
    )


def test_the_packaged_recipes_are_listed(monkeypatch, tmp_path):
    (tmp_path / "demo.yaml").write_text("# Ten minutes on two cores. More.\nname: demo\n")
    monkeypatch.setattr("amenable.recipe_loading.resources.files", lambda _: tmp_path)
    assert amenable("recipes").stdout == "demo  Ten minutes on two cores\n"
    assert json.loads(amenable("recipes", "--json").stdout)["recipes"][0]["name"] == "demo"


def test_version_and_help():
    assert amenable("--version").stdout.startswith("amenable 0.")
    assert "RECIPE" in amenable("run", "--help").stdout
    assert amenable("runn", "x").exit_code == 2
