"""What is sent to a tracker: the metrics of the files, to one run a stage that a later attempt goes on with."""

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from amenable.pipeline import run_pipeline
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stages.context import Context
from corpus.problems import RunProblem, UsageProblem
from learners import tracking
from learners.metrics import MetricsLog, read_metrics
from learners.tracking import KEY, Tracked, WandbRun, WandbSettings, check_wandb

WANDB = {"wandb": {"project": "p", "mode": "offline"}}


class StandIn(ModuleType):
    """The package wandb as far as it is used: it keeps what it is told."""

    Error = type("Error", (Exception,), {})
    Settings = SimpleNamespace

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.refuses: Exception | None = None
        self.__spec__ = SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]

    def init(self, **options: Any) -> Any:
        if self.refuses is not None:
            raise self.refuses
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def context(tmp_path, **tracking: Any) -> Context:
    recipe = Recipe.model_validate({"name": "x", "run_directory": str(tmp_path), "tracking": tracking})
    return Context(recipe, RunDirectory(tmp_path), Progress(), None)  # pyright: ignore[reportArgumentType]


def test_a_tracker_is_told_what_the_file_is_told_but_for_what_is_not_finite(wandb, tmp_path):
    tracked = Tracked(WandbSettings(project="p", entity="team", mode="offline"), "x", "x-0011223344")
    with MetricsLog(tmp_path, tracker=WandbRun(tracked, "ppo", tmp_path)) as metrics:
        metrics.log(1, {"objective/kl": 0.5, "loss/ptx": float("nan")})
        metrics.log(2, {"objective/kl": 0.75})
    assert wandb.logged == [(1, {"objective/kl": 0.5}), (2, {"objective/kl": 0.75})]
    assert wandb.finished == 1
    (begun,) = wandb.begun
    assert (begun["project"], begun["entity"], begun["mode"]) == ("p", "team", "offline")
    assert (begun["id"], begun["group"], begun["job_type"]) == ("x-0011223344-ppo", "x-0011223344", "ppo")
    assert begun["resume"] == "allow"
    assert "config" not in begun


def test_training_goes_on_without_a_tracker_that_fails_or_does_not_end(wandb, tmp_path, monkeypatch, caplog):
    def gone(values: dict[str, float], step: int) -> None:
        wandb.finished += 1
        raise OSError("the service is gone")

    monkeypatch.setattr(wandb, "log", gone)
    monkeypatch.setattr(wandb, "finish", lambda: time.sleep(5))
    monkeypatch.setattr(tracking, "FINISH_S", 0.05)
    tracked = Tracked(WandbSettings(project="p", mode="offline"), "x", "x-0011223344")
    with MetricsLog(tmp_path, tracker=WandbRun(tracked, "ppo", tmp_path)) as metrics:
        metrics.log(1, {"objective/kl": 0.5})
        metrics.log(2, {"objective/kl": 0.75})
    assert wandb.finished == 1, "what failed once is not asked again"
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "takes no more metrics" in caplog.text
    assert "within 0.05 s" in caplog.text


def test_a_run_that_goes_on_has_the_same_id_there_and_another_run_another(tmp_path):
    first = context(tmp_path / "a", **WANDB)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert first.tracked() == context(tmp_path / "a", **WANDB).tracked()
    assert first.tracked().run_id.startswith("x-")
    assert first.tracked().run_id != context(tmp_path / "b", **WANDB).tracked().run_id
    assert context(tmp_path / "c").tracked() is None
    assert not (tmp_path / "c").exists()
    (tmp_path / "a" / "tracking.json").write_text("{")
    with pytest.raises(RunProblem, match=r"tracking\.json cannot be read"):
        first.tracked()


def test_without_the_package_the_sentence_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("learners.tracking.find_spec", lambda name: None)
    with pytest.raises(UsageProblem, match="pip install wandb"):
        check_wandb(WandbSettings(project="p"))
    recipe = Recipe.model_validate({"name": "x", "run_directory": str(tmp_path / "x"), "tracking": WANDB})
    with pytest.raises(UsageProblem, match="pip install wandb"):
        run_pipeline(recipe, until=None, progress=Progress(json=True), address=None)
    assert not (tmp_path / "x").exists(), "it is told before anything is made"


def test_the_key_comes_from_the_environment_alone(wandb):
    with pytest.raises(UsageProblem, match=f"{KEY} is not set"):
        check_wandb(WandbSettings(project="p"), {})
    check_wandb(WandbSettings(project="p"), {KEY: "k" * 40})
    check_wandb(WandbSettings(project="p", mode="offline"), {})
    with pytest.raises(ValueError, match="api_key"):
        WandbSettings.model_validate({"project": "p", "api_key": "k" * 40})


def test_a_tracker_that_does_not_take_the_run_is_told(wandb, tmp_path):
    wandb.refuses = wandb.Error("no such\n entity")
    with pytest.raises(RunProblem, match=r"did not take the run \(no such entity\); .*mode=offline"):
        WandbRun(Tracked(WandbSettings(project="p", mode="offline"), "x", "x-1"), "ppo", tmp_path)
