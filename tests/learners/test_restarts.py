"""A learner group whose ranks are killed, stopped and stuck: it restarts, and jobs go on from what they had saved."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import group_jobs
import pytest
from group_jobs import Steps

from corpus.problems import RunProblem
from learners.group import LearnerGroup, Patience
from learners.ranks import Ranks
from learners.worker import Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SILENCE_S = 15.0
STALL_S = 30.0


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from cluster.session import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.getcwd()]))  # for group_jobs
        with session(None, cpus=6):
            yield


class Group(LearnerGroup):
    """With the notes that it made."""

    def __init__(self, workers: int, storage: Path, patience: Patience) -> None:
        self.notes: list[str] = []
        super().__init__(Ranks(workers, 1), str(storage), patience, note=self.notes.append)


@pytest.fixture(scope="module")
def group(ray_session, tmp_path_factory) -> Iterator[Group]:
    """One rank that may be restarted often."""
    patience = Patience(300, silence_s=SILENCE_S, stall_s=STALL_S, stop_grace_s=8.0, max_restarts=9)
    with Group(1, tmp_path_factory.mktemp("one"), patience) as group:
        group.wait_until_ready(never)
        yield group


@pytest.fixture(scope="module")
def pair(ray_session, tmp_path_factory) -> Iterator[Group]:
    """Two ranks that may be restarted twice."""
    with Group(2, tmp_path_factory.mktemp("two"), Patience(300, max_restarts=2)) as group:
        group.wait_until_ready(never)
        yield group


def never() -> bool:
    return False


def silent(progress: Progress) -> None:
    pass


def test_a_rank_that_is_killed_in_mid_job_is_restarted_and_the_job_goes_on_from_what_it_saved(group, tmp_path):
    group.notes.clear()
    told: list[Progress] = []
    result = group.run(group_jobs.makes_steps, Steps(tmp_path, signal.SIGKILL), told.append, never)
    assert result["resumed"] == 3
    assert [progress.done for progress in told] == [1, 2, 3, 4, 5, 6]
    assert len(group.notes) == 1
    assert re.fullmatch(r"learners restarted \(\d of 9\) after: rank 0 died: its process was killed .*", group.notes[0])


def test_a_rank_that_is_stopped_is_found_killed_and_restarted(group, tmp_path):
    group.notes.clear()
    result = group.run(group_jobs.makes_steps, Steps(tmp_path, signal.SIGSTOP), silent, never)
    assert result["resumed"] == 3
    assert len(group.notes) == 1
    assert f"after: rank 0 gave no sign of life for {SILENCE_S:g} s" in group.notes[0]


@pytest.mark.extended
def test_a_rank_that_lives_but_does_not_move_is_killed_and_restarted(group, tmp_path):
    group.notes.clear()
    assert group.run(group_jobs.is_stuck_once, tmp_path / "stuck", silent, never) == {"done": True}
    assert f"after: rank 0 made no progress for {STALL_S:g} s" in group.notes[0]


@pytest.mark.extended
def test_a_rank_that_dies_between_two_jobs_hurts_neither(group, tmp_path):
    first = group.run(group_jobs.counts_its_runs, tmp_path, silent, never)
    os.kill(first["pid"], signal.SIGKILL)
    second = group.run(group_jobs.adds, [1, 2], silent, never)
    assert second["sum"] == 3
    assert (tmp_path / "runs-0").read_text() == "x", "a job that was done is not done again"


def test_a_problem_of_the_job_is_told_and_not_run_again(group, tmp_path):
    with pytest.raises(RunProblem, match=r"^The loss is NaN\.$"):
        group.run(group_jobs.counts_its_runs_and_has_a_problem, tmp_path, silent, never)
    group.run(group_jobs.adds, [1], silent, never)
    assert (tmp_path / "runs-0").read_text() == "x"


def test_a_stop_without_a_checkpoint_in_its_grace_is_said(group, tmp_path):
    began = time.monotonic()
    with pytest.raises(RunProblem, match=r"no checkpoint came within 8 s .*: the same command continues") as caught:
        group.run(group_jobs.does_not_hear_of_the_stop, tmp_path / "end", silent, lambda: True)
    assert "what was saved before stands" in str(caught.value)
    assert time.monotonic() - began >= 8.0
    (tmp_path / "end").touch()
    assert group.run(group_jobs.adds, [1], silent, never)["sum"] == 1


@pytest.mark.extended
def test_a_rank_that_dies_while_it_is_to_stop_is_not_waited_for(group, tmp_path):
    with pytest.raises(RunProblem, match=r"were to save and stop, and could not: rank 0 died: .*; the same command"):
        group.run(group_jobs.makes_steps, Steps(tmp_path, signal.SIGKILL, at=2), silent, lambda: True)
    assert group.run(group_jobs.adds, [1], silent, never)["sum"] == 1


@pytest.mark.extended
@pytest.mark.usefixtures("ray_session")
def test_a_group_that_has_restarted_as_often_as_it_may_says_who_died(tmp_path):
    with Group(1, tmp_path, Patience(300, max_restarts=1)) as group:
        group.wait_until_ready(never)
        steps = Steps(tmp_path, signal.SIGKILL, once=False)
        with pytest.raises(RunProblem, match=r"^Learner rank 0 died: .*; the same command continues"):
            group.run(group_jobs.makes_steps, steps, silent, never)
    assert (tmp_path / "struck").read_text() == "xx"
    assert len(group.notes) == 1


@pytest.mark.extended
def test_what_a_rank_runs_into_when_another_dies_is_not_what_the_job_ended_with(pair, tmp_path):
    steps = Steps(tmp_path, signal.SIGKILL, rank=1)
    result = pair.run(group_jobs.makes_steps, steps, silent, never)
    assert (result["resumed"], result["ranks"]) == (3, 2.0)
    assert pair.notes == ["learners restarted (1 of 2) after: rank 1 died: its process was killed or crashed"]


@pytest.mark.extended
def test_two_ranks_tell_their_problem_once_and_the_next_job_has_a_new_group(pair, tmp_path):
    with pytest.raises(RunProblem, match=r"^The loss is NaN\.$"):
        pair.run(group_jobs.counts_its_runs_and_has_a_problem, tmp_path, silent, never)
    assert pair.run(group_jobs.adds, [1], silent, never) == {"sum": 1, "rank": 0, "world_size": 2}
    assert (tmp_path / "runs-0").read_text() == "x"
