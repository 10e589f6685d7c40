"""A failure that another attempt cannot mend: recorded under automatic attempts, told again at once, cleared by a
change."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from amenable.cli import app
from amenable.permanent_failure import ATTEMPT, FAILURE_FILE, read_failure, recorded
from corpus.problems import RunProblem, UsageProblem

pytest_plugins = ["tests.object_store"]

WRONG_DATA = "comparisons.jsonl, row 17: there is no prompt."


class Pipeline:
    """In place of the pipeline: counts how often it was called, and fails in a stage as it is told."""

    def __init__(self) -> None:
        self.calls = 0
        self.problem: Exception | None = None

    def __call__(self, recipe: Any, until: Any, progress: Any, address: Any, variables: Any) -> dict[str, Any]:
        self.calls += 1
        with recorded(recipe, "rm"):
            if self.problem is not None:
                raise self.problem
        raise RunProblem("Everything went well, and the test has no summary to show.", "run/unexpected")


@pytest.fixture
def pipeline(monkeypatch) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setattr("amenable.pipeline.run_pipeline", stand_in)
    return stand_in


@pytest.fixture
def attempts(monkeypatch):
    """Something else than a person starts attempts."""
    monkeypatch.setenv(ATTEMPT, "kuberay")


def run(directory: Path, *overrides: str):
    return CliRunner().invoke(app, ["run", "demo", *overrides, "--run", str(directory)])


def wrong_data() -> UsageProblem:
    return UsageProblem(WRONG_DATA, "data/row")


@pytest.mark.usefixtures("attempts")
def test_what_a_person_must_change_ends_later_attempts_before_they_begin(pipeline, tmp_path):
    pipeline.problem = wrong_data()
    first = run(tmp_path)
    assert (first.exit_code, pipeline.calls) == (2, 1)
    failure = read_failure(str(tmp_path))
    assert failure is not None
    assert (failure.where, failure.problem) == ("rm", f"{WRONG_DATA} [data/row]")
    second = run(tmp_path)
    assert (second.exit_code, pipeline.calls) == (2, 1)
    assert "An earlier attempt with this recipe failed for good (rm, " in second.stderr
    assert WRONG_DATA in second.stderr
    assert str(tmp_path / FAILURE_FILE) in second.stderr


@pytest.mark.usefixtures("attempts")
@pytest.mark.parametrize("how", ["another recipe", "the file removed", "another version"])
def test_it_is_cleared(pipeline, tmp_path, monkeypatch, how):
    pipeline.problem = wrong_data()
    run(tmp_path)
    overrides = []
    if how == "another recipe":
        overrides = ["seed=7"]
    elif how == "the file removed":
        (tmp_path / FAILURE_FILE).unlink()
    else:
        monkeypatch.setattr("amenable.permanent_failure.version", lambda name: "9.9")
    pipeline.problem = None
    again = run(tmp_path, *overrides)
    assert pipeline.calls == 2
    assert "Everything went well" in again.stderr
    assert read_failure(str(tmp_path)) is None


@pytest.mark.usefixtures("attempts")
def test_memory_that_no_node_has_costs_no_second_cluster(pipeline, tmp_path):
    pipeline.problem = RunProblem("learner takes 99 GiB", "cluster/too-small")
    first = run(tmp_path)
    assert (first.exit_code, pipeline.calls) == (1, 1)
    second = run(tmp_path)
    assert (second.exit_code, pipeline.calls) == (2, 1)
    assert "learner takes 99 GiB" in second.stderr


@pytest.mark.usefixtures("attempts")
@pytest.mark.parametrize(
    "problem",
    [
        RunProblem("a rank died", "run/unexpected"),
        RunProblem("a node does not see the storage", "cluster/not-fit"),
        UsageProblem("the store could not be asked", "data/row"),
    ],
)
def test_what_may_pass_is_tried_again(pipeline, tmp_path, problem):
    if isinstance(problem, UsageProblem):
        problem.__cause__ = ConnectionError("refused")
    pipeline.problem = problem
    for _ in range(2):
        run(tmp_path)
    assert pipeline.calls == 2
    assert read_failure(str(tmp_path)) is None


def test_a_person_is_never_held_back(pipeline, tmp_path):
    pipeline.problem = wrong_data()
    for _ in range(2):
        run(tmp_path)
    assert pipeline.calls == 2
    assert not (tmp_path / FAILURE_FILE).exists()


def test_a_person_may_try_what_an_attempt_recorded(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT, "kuberay")
    pipeline.problem = wrong_data()
    run(tmp_path)
    monkeypatch.delenv(ATTEMPT)
    run(tmp_path)
    assert pipeline.calls == 2


@pytest.mark.usefixtures("attempts")
@pytest.mark.parametrize(
    ("override", "says"),
    [("ppo.clap=1", "clap"), ("sft.context_length=8", "sft.context_length 8 is less than")],
)
def test_a_recipe_that_is_wrong_is_recorded_and_a_right_one_goes_on(pipeline, tmp_path, override, says):
    wrong = run(tmp_path, override)
    assert wrong.exit_code == 2
    assert says in wrong.stderr
    assert pipeline.calls == 0
    failure = read_failure(str(tmp_path))
    assert failure is not None
    assert says in failure.problem
    run(tmp_path)
    assert pipeline.calls == 1
    assert read_failure(str(tmp_path)) is None


@pytest.mark.usefixtures("attempts")
def test_a_record_that_cannot_be_read_holds_nobody_back(pipeline, tmp_path):
    (tmp_path / FAILURE_FILE).write_text('{"schema_version": 1, "who": "knows"}')
    run(tmp_path)
    assert pipeline.calls == 1


@pytest.mark.usefixtures("attempts")
def test_a_record_that_cannot_be_written_does_not_hide_the_problem(pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    pipeline.problem = wrong_data()
    ended = run(tmp_path / "file")
    assert ended.exit_code == 2
    assert WRONG_DATA in ended.stderr


@pytest.mark.usefixtures("attempts")
def test_the_record_of_a_run_in_an_object_store_lies_in_the_store(pipeline, store, query, keys_in):
    pipeline.problem = wrong_data()
    place = f"s3://bucket/run{query}"
    for _ in range(2):
        ended = CliRunner().invoke(app, ["run", "demo", "--run", place])
        assert ended.exit_code == 2
    assert pipeline.calls == 1
    failure = read_failure(place)
    assert failure is not None
    assert failure.problem == f"{WRONG_DATA} [data/row]"
    assert keys_in() == ["run/failure.json"]
    CliRunner().invoke(app, ["run", "demo", "seed=7", "--run", place])
    assert pipeline.calls == 2
