"""GPU-hours: their arithmetic, the stop at the limit, and what the next command counts on from."""

import json
import threading
import time

import pytest
import typer

from amenable import interruption
from amenable.crew import Crew
from amenable.ending import INTERRUPTED, ending
from amenable.gpu_budget import FILE, GpuBudget, GpuCount, gpu_hours
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from corpus.problems import RunProblem, UsageProblem

DEADLINE_S = 10.0


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def flag_is_down():
    interruption._requested.clear()
    yield
    interruption._requested.clear()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget_of(tmp_path, clock: Clock, limit: float | None) -> GpuBudget:
    return GpuBudget(tmp_path / FILE, limit, clock, look_s=0.01)


def may_write() -> None:
    """This command holds the run."""


def kept(tmp_path) -> float:
    return json.loads((tmp_path / FILE).read_text())["gpu_hours"]


def asked_to_stop() -> bool:
    """Whether a stop is asked for within the deadline."""
    return interruption.wait(DEADLINE_S)


# arithmetic --------------------------------------------------------------------------------------------------------


def test_gpu_hours_are_gpus_times_hours():
    assert gpu_hours(8, 1800) == 4.0
    assert gpu_hours(0, 10**6) == 0.0


def test_each_role_counts_from_when_it_holds_its_gpus():
    count = GpuCount(used=2.0)
    count.hold("learners", 8, now=0)
    count.hold("generators", 4, now=3600)
    assert count.at(3600) == 2 + 8
    assert count.at(7200) == 2 + 8 + 12
    count.hold("generators", 1, now=7200)  # scaled in
    assert count.at(10800) == 2 + 8 + 12 + 9


def test_holding_the_same_again_counts_nothing_twice():
    count = GpuCount()
    for now in (0, 900, 1800):
        count.hold("learners", 2, now)
    assert count.at(3600) == 2.0


# the stop ----------------------------------------------------------------------------------------------------------


def test_the_limit_asks_for_a_stop_and_the_ending_says_what_was_reached_and_how_to_go_on(tmp_path, clock):
    budget = budget_of(tmp_path, clock, limit=4.0)

    def work() -> None:
        with budget.counting(may_write):
            budget.hold("learners", 8)
            assert not interruption.requested()
            clock.now += 1800
            assert asked_to_stop()
            raise interruption.Interrupted("ppo, update 17 of 48")  # as the learners do, after their checkpoint

    with pytest.raises(interruption.LimitReached) as ended:
        work()
    said = str(ended.value)
    assert "limits.gpu_hours 4 is used up at ppo, update 17 of 48" in said
    assert "the run has had 4 GPU-hours" in said
    assert "with a higher limit the same command continues" in said
    assert kept(tmp_path) == 4.0


def test_below_the_limit_nothing_is_asked_for(tmp_path, clock):
    budget = budget_of(tmp_path, clock, limit=4.0)
    with budget.counting(may_write):
        budget.hold("learners", 8)
        clock.now += 1799
        time.sleep(0.1)  # ten looks
        assert not interruption.requested()
    assert kept(tmp_path) == pytest.approx(4.0, rel=1e-3)


def test_without_a_limit_hours_are_counted_for_one_that_comes_later(tmp_path, clock):
    with budget_of(tmp_path, clock, None).counting(may_write):
        pass
    assert not (tmp_path / FILE).exists()
    budget = budget_of(tmp_path, clock, None)
    with budget.counting(may_write):
        budget.hold("generators", 2)
        clock.now += 3600
    assert kept(tmp_path) == 2.0


def test_the_next_command_counts_on(tmp_path, clock):
    for expected in (1.0, 2.0):
        budget = budget_of(tmp_path, clock, limit=10.0)
        with budget.counting(may_write):
            budget.hold("learners", 1)
            clock.now += 3600
        assert kept(tmp_path) == expected


def test_a_run_that_has_used_its_hours_ends_before_anything_is_reserved_until_the_limit_is_raised(tmp_path, clock):
    (tmp_path / FILE).write_text('{"schema_version": 1, "gpu_hours": 5.0}')
    entered = False
    with (
        pytest.raises(interruption.LimitReached, match="at the beginning"),
        budget_of(tmp_path, clock, limit=5.0).counting(may_write),
    ):
        entered = True
    assert not entered
    with budget_of(tmp_path, clock, limit=5.5).counting(may_write):
        entered = True
    assert entered


def test_a_persons_own_stop_stays_theirs(tmp_path, clock):
    budget = budget_of(tmp_path, clock, limit=100.0)
    with pytest.raises(interruption.Interrupted) as ended, budget.counting(may_write):
        raise interruption.Interrupted("ppo, update 2 of 48")
    assert type(ended.value) is interruption.Interrupted


def test_a_problem_is_told_as_it_is_and_the_hours_are_kept(tmp_path, clock):
    budget = budget_of(tmp_path, clock, limit=1.0)

    def work() -> None:
        with budget.counting(may_write):
            budget.hold("learners", 1)
            clock.now += 7200
            raise RunProblem("a rank died", "run/unexpected")

    with pytest.raises(RunProblem, match="a rank died"):
        work()
    assert kept(tmp_path) == 2.0


def test_a_command_that_lost_the_run_does_not_write_there(tmp_path, clock):
    (tmp_path / FILE).write_text('{"schema_version": 1, "gpu_hours": 1.0}')

    def lost() -> None:
        raise RunProblem("another attempt has taken over", "run/unexpected")

    budget = budget_of(tmp_path, clock, limit=None)
    with budget.counting(lost):
        budget.hold("learners", 8)
        clock.now += 3600
    assert kept(tmp_path) == 1.0


def test_a_damaged_count_is_told_and_not_taken_for_nothing(tmp_path, clock):
    (tmp_path / FILE).write_text("{}")
    with (
        pytest.raises(RunProblem, match="does not say how many GPU-hours"),
        budget_of(tmp_path, clock, limit=5.0).counting(may_write),
    ):
        pass


def test_no_thread_stays_behind(tmp_path, clock):
    with budget_of(tmp_path, clock, limit=5.0).counting(may_write):
        assert any(thread.name == "gpu-budget" for thread in threading.enumerate())
    assert not any(thread.name == "gpu-budget" for thread in threading.enumerate())


def test_the_command_ends_with_the_sentence_and_the_code_of_a_stop(capsys):
    with pytest.raises(typer.Exit) as ended, ending(True, lambda: "ppo"):
        raise interruption.LimitReached("limits.gpu_hours 4 is used up at ppo, update 17 of 48.")
    assert ended.value.exit_code == INTERRUPTED
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "problem": "limits.gpu_hours 4 is used up at ppo, update 17 of 48.",
        "kind": "limit",
    }
    assert captured.err == "limits.gpu_hours 4 is used up at ppo, update 17 of 48.\n"


# the recipe and the crew -------------------------------------------------------------------------------------------


def test_a_recipe_without_gpus_cannot_have_the_limit():
    with pytest.raises(UsageProblem, match=r"limits\.gpu_hours 5 can never be reached, because no role has a GPU"):
        load_recipe("demo", ["limits.gpu_hours=5"], Recipe)
    assert load_recipe("demo", ["limits.gpu_hours=5", "scoring.gpus=0.5"], Recipe).gpus == 0.5
    with pytest.raises(UsageProblem, match=r"limits\.gpu_hours"):
        load_recipe("paper", ["limits.gpu_hours=0"], Recipe)
    assert load_recipe("paper", [], Recipe).gpus == 8 + 4 + 2


def test_the_crew_tells_of_the_gpus_that_it_asks_for(tmp_path, monkeypatch):
    held: dict[str, float] = {}
    recipe = load_recipe("paper", [], Recipe)
    crew = Crew(recipe, tmp_path, Progress(json=True), None, hold=lambda role, gpus: held.update({role: gpus}))
    monkeypatch.setattr(crew, "_ray", lambda: None)
    monkeypatch.setattr("learners.group.LearnerGroup", lambda *args: object())
    crew.learners()
    assert held == {"learners": 8}

    class Spec:
        start = ()

        def make(self, name, room=None):
            return name

        class placement:
            reserve = staticmethod(lambda name: name)

    monkeypatch.setattr(crew, "generator_spec", lambda *args: Spec())
    monkeypatch.setattr(crew, "scoring_spec", lambda *args: Spec())
    crew.start_generators("model", "tokenizer", 64)
    crew.scoring()
    assert held == {"learners": 8, "generators": 4, "scoring": 2}
    crew.generators_serve(6)
    assert held["generators"] == 6


# a whole command ---------------------------------------------------------------------------------------------------


def test_learners_are_asked_to_stop_as_by_a_signal_and_scaled_generators_are_counted(tmp_path):
    from amenable.run_directory import RunDirectory
    from amenable.stages.context import Context
    from learners.worker import Interrupted as Stopped
    from learners.worker import Progress as LearnersProgress

    class Group:
        def run(self, run, job, show, should_stop):
            show(LearnersProgress("ppo", 3, 9, "updates", {"fleet/generators_serving": 5.0}))
            assert not should_stop()
            interruption.request()
            assert should_stop()
            raise Stopped("ppo, update 3 of 9")

    class Learning:
        served = 0

        def ready_learners(self):
            return Group()

        def generators_serve(self, count):
            self.served = count

    crew = Learning()
    progress = Progress(json=True)
    progress.plan(["ppo"])
    progress.stage("ppo")
    context = Context(Recipe(name="x"), RunDirectory(tmp_path), progress, crew)  # type: ignore[arg-type]
    with pytest.raises(interruption.Interrupted, match="ppo, update 3 of 9"):
        context.learn(dict, None)
    assert crew.served == 5


def test_a_run_stops_at_its_limit_between_stages_and_the_next_command_ends_before_any(tmp_path, monkeypatch):
    from amenable import pipeline
    from amenable.stage_reuse import StageSpec
    from amenable.stages.context import Finished, Stage

    worked: list[str] = []

    def body(context, spec):
        worked.append(spec.name)
        context.crew.generators_serve(8)  # 8 GPUs
        assert asked_to_stop()  # after a second: the limit is a thousandth of one
        (spec.directory / "made").write_text("x")
        return Finished([spec.directory / "made"], {})

    def stages_of(recipe, run, sources=None):
        return [Stage(name, StageSpec(name, run.root / name, {}), body) for name in ("sft", "rm")]

    monkeypatch.setattr(pipeline, "check_early", lambda recipe, address: None)
    monkeypatch.setattr(pipeline, "stages_of", stages_of)
    limits = ["limits.gpu_hours=1e-6", "rollouts.gpus=1", "rollouts.generators=8", f"run_directory={tmp_path / 'run'}"]
    recipe = load_recipe("demo", limits, Recipe)
    with pytest.raises(interruption.LimitReached, match="is used up at the beginning of rm"):
        pipeline.run_pipeline(recipe, None, Progress(json=True), None)
    assert worked == ["sft"]
    used = kept(tmp_path / "run")
    assert used > 1e-6
    interruption._requested.clear()
    with pytest.raises(interruption.LimitReached, match="is used up at the beginning:"):
        pipeline.run_pipeline(recipe, None, Progress(json=True), None)
    assert worked == ["sft"]
    assert kept(tmp_path / "run") == used
