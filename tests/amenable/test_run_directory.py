"""The run's directory: where things lie, what is written, and that nothing is written over a stranger's files."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from amenable.recipe_loading import load_recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec, begin, complete
from amenable.summary import StageSummary, Summary
from corpus.problems import RunProblem, UsageProblem


class Recipe(BaseModel):
    name: str
    seed: int = 0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "runs" / "one")
    directory.create()
    return directory


def test_the_places_are_those_of_the_architecture(run):
    at = run.relative
    assert at(run.table("demonstrations", "train")) == "data/demonstrations-train.parquet"
    assert at(run.tokenizer) == "data/tokenizer"
    assert at(run.sft_epoch(3)) == "sft/epoch-03"
    first = run.round(1)
    places = [first.collect, first.reward_model, first.select_sft, first.ppo_init, first.ppo, first.evaluation]
    assert [at(place) for place in places] == [
        f"round-01/{name}" for name in ("collect", "rm", "select-sft", "ppo-init", "ppo", "eval")
    ]


def test_the_root_is_absolute_so_that_workers_elsewhere_find_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunDirectory("runs/x").root == tmp_path / "runs" / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/x").root == tmp_path / "x"


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageProblem, match="holds files that are not a run's"):
        RunDirectory(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageProblem, match="is a file"):
        RunDirectory(tmp_path / "x").create()
    with pytest.raises(UsageProblem, match="is a file"):
        RunDirectory(tmp_path / "x" / "y").create()


def test_a_run_may_be_created_again(run):
    run.write_recipe(Recipe(name="one"))
    run.create()


def test_the_resolved_recipe_reads_back(run):
    recipe = Recipe(name="one", seed=4)
    run.write_recipe(recipe)
    assert load_recipe(run.recipe, [], Recipe) == recipe


def test_lineage_says_versions_data_and_the_stages_that_are_complete(run):
    models = {"some/base": {"commit on the Hub": "c0ffee"}}
    run.write_lineage("one", {"demonstrations": "ab" * 32}, {"demonstrations": {"licence": "MIT"}}, models)
    first = json.loads(run.lineage.read_text())
    assert first["stages"] == {}
    assert {"python", "amenable", "ray", "torch", "vllm", "transformers", "deepspeed", "pyarrow", "numpy"} == set(
        first["versions"]
    )
    assert first["versions"]["ray"][0].isdigit()
    assert first["data"] == {"demonstrations": "ab" * 32}
    assert first["data_sets"] == {"demonstrations": {"licence": "MIT"}}
    assert first["models"] == models

    base = StageSpec("base", run.base, {"steps": 1})
    reward_model = StageSpec("rm", run.round(1).reward_model, {}, (run.base,))
    for spec in (base, reward_model):
        begin(spec)
        complete(spec, [], 2.0, {})
    begin(StageSpec("sft", run.sft, {}))  # not complete
    run.write_lineage("one", {}, {}, {})
    second = json.loads(run.lineage.read_text())
    assert second["created"] == first["created"]
    assert set(second["stages"]) == {"base", "round-01/rm"}
    assert set(second["stages"]["round-01/rm"]["parents"]) == {"base"}


def test_the_summary_reads_back_and_is_missed_where_it_is_not(run):
    with pytest.raises(RunProblem, match=r"has no summary\.json yet"):
        run.read_summary()
    summary = Summary(
        run="one",
        run_directory="runs/one",
        synthetic=True,
        seconds={"sft": 2.0},
        stages={"sft": StageSummary(reused=False, seconds=2.0, values={"loss": 1.0})},
    )
    run.write_summary(summary)
    assert run.read_summary() == summary
    run.summary.write_text("{")
    with pytest.raises(RunProblem, match="cannot be read as a summary"):
        run.read_summary()


def test_nothing_half_written_is_left_beside(run):
    run.write_recipe(Recipe(name="one"))
    run.write_lineage("one", {}, {}, {})
    assert sorted(path.name for path in run.root.iterdir()) == ["lineage.json", "recipe.yaml"]


def test_a_run_is_found_by_path_and_by_name_and_nothing_else_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.write_recipe(Recipe(name="one"))
    (tmp_path / "empty").mkdir()
    assert RunDirectory.find("one").root == run.root
    assert RunDirectory.find("runs/one").root == run.root
    with pytest.raises(UsageProblem, match="There is no run in empty or runs/empty"):
        RunDirectory.find("empty")
    with pytest.raises(UsageProblem, match=r"There is no run in \.\./elsewhere"):
        RunDirectory.find("../elsewhere")
    with pytest.raises(UsageProblem, match=r"There is no run in \.\."):
        RunDirectory.find("..")


def test_a_run_whose_name_no_recipe_could_give_is_found_by_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunDirectory("else where").create()
    RunDirectory("else where").write_recipe(Recipe(name="one"))
    assert RunDirectory.find("else where").root == tmp_path / "else where"


def test_a_run_that_may_not_be_reached_is_one_sentence(run, monkeypatch):
    run.write_recipe(Recipe(name="one"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RunDirectory, "is_a_run", refuse)
    with pytest.raises(UsageProblem, match=r"runs/one: the run cannot be reached \(Permission denied\)\.$"):
        RunDirectory.find(str(run.root))
    with pytest.raises(UsageProblem, match="File name too long"):
        RunDirectory.find("x" * 300)
