"""The learner group with a real desk and a real rank: what becomes of jobs that end well, are stopped, fail or die."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import group_jobs
import pytest

from corpus.problems import RunProblem
from corpus.run_epoch import RunEpoch
from learners import desk as desks
from learners.group import LearnerGroup, Patience
from learners.ranks import Ranks
from learners.worker import Interrupted, Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from cluster.session import session

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])  # ranks import group_jobs
    with session(None, cpus=6):
        yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray-train")


@pytest.fixture(scope="module")
def lease(storage: Path) -> Path:
    path = storage / "run.lease"
    path.write_text(json.dumps({"epoch": 3, "pid": 1, "host": "here", "started": "now"}))
    return path


@pytest.fixture(scope="module")
def group(ray_session, storage: Path, lease: Path) -> Iterator[LearnerGroup]:
    """One rank, ready."""
    with LearnerGroup(Ranks(1, 1), str(storage), Patience(300), RunEpoch(lease, 3)) as group:
        group.wait_until_ready(never)
        yield group


def new_desk() -> Any:
    actor: Any = desks.Desk
    return actor.remote()


def never() -> bool:
    return False


def silent(progress: Progress) -> None:
    pass


def test_a_job_is_done_its_progress_is_told_and_the_next_follows_in_the_same_group(group):
    told: list[Progress] = []
    assert group.run(group_jobs.adds, [1, 2], told.append, never) == {"sum": 3, "rank": 0, "world_size": 1}
    assert told == [Progress("toy", 1, 1, "steps", {"loss": 0.5})]
    assert group.run(group_jobs.adds, [3, 4], silent, never)["sum"] == 7


def test_a_job_that_is_asked_to_stop_says_where_it_did(group):
    told: list[Progress] = []
    with pytest.raises(Interrupted, match=r"^toy, step 3 of 10$"):
        group.run(group_jobs.works_until_stopped, 60.0, told.append, lambda: bool(told))
    assert group.run(group_jobs.adds, [1], silent, never)["sum"] == 1


def test_an_expected_problem_stays_one_sentence(group):
    with pytest.raises(RunProblem, match=r"^The loss is NaN\.$") as caught:
        group.run(group_jobs.has_a_problem, "The loss is NaN.", silent, never)
    assert not hasattr(caught.value, "__notes__")
    assert group.run(group_jobs.adds, [1], silent, never)["sum"] == 1


def test_a_mistake_of_the_program_shows_the_line_of_the_learner_that_made_it(group):
    with pytest.raises(KeyError, match="a key that is missing") as caught:
        group.run(group_jobs.has_a_bug, {}, silent, never)
    shown = "".join(traceback.format_exception(caught.value))
    assert "in has_a_bug" in shown
    assert 'job["a key that is missing"]' in shown
    assert group.run(group_jobs.adds, [1], silent, never)["sum"] == 1


def test_an_error_that_cannot_be_sent_arrives_as_what_it_says(group):
    with pytest.raises(RuntimeError, match=r"^Odd: one thing and another") as caught:
        group.run(group_jobs.has_an_odd_bug, None, silent, never)
    assert "in has_an_odd_bug" in "".join(traceback.format_exception(caught.value))


def test_a_learner_commits_only_while_its_command_holds_the_lease(group, lease):
    assert group.run(group_jobs.commits, None, silent, never) == {"committed": True}
    held = lease.read_text()
    lease.write_text(json.dumps({**json.loads(held), "epoch": 4, "pid": 4242, "host": "far-away"}))
    with pytest.raises(RunProblem, match="taken over by process 4242 on far-away"):
        group.run(group_jobs.commits, None, silent, never)
    lease.write_text(held)


@pytest.mark.usefixtures("ray_session")
def test_a_desk_that_is_killed_is_named_and_the_group_still_ends(storage):
    import ray

    group = LearnerGroup(Ranks(1, 1), str(storage), Patience(300, max_restarts=0))
    group.wait_until_ready(never)
    ray.kill(group._desk)
    with pytest.raises(RunProblem, match=r"^The learners' desk died: .*; the same command continues"):
        group.run(group_jobs.adds, [1], silent, never)
    group.close()
    assert not group._thread.is_alive()


@pytest.mark.extended
@pytest.mark.usefixtures("ray_session")
def test_a_rank_that_is_killed_is_named_where_the_group_may_not_restart(storage):
    with LearnerGroup(Ranks(1, 1), str(storage), Patience(300, max_restarts=0)) as group:
        group.wait_until_ready(never)
        with pytest.raises(RunProblem, match=r"^Learner rank 0 died: .*; the same command continues"):
            group.run(group_jobs.is_killed, None, silent, never)


@pytest.mark.usefixtures("ray_session")
def test_a_rank_that_still_sits_in_a_job_is_not_left_to_the_end_of_the_session(storage):
    with LearnerGroup(Ranks(2, 1), str(storage), Patience(300)) as group:
        group.wait_until_ready(never)
        with pytest.raises(RunProblem, match="The first rank has a problem"):
            group.run(group_jobs.has_a_problem_on_the_first_rank, 900.0, silent, never)
    assert not group._thread.is_alive(), "Ray Train's fit() still waits"


@pytest.mark.usefixtures("ray_session")
def test_a_desk_that_does_not_answer_is_named_at_its_deadline():
    desk = new_desk()
    with pytest.raises(RunProblem, match=r"Waited 0 s for the learners' desk"):
        desks.at_desk(desk.next_job.remote(0, 0, 60.0), deadline_s=0.2)


@pytest.mark.usefixtures("ray_session")
def test_an_idle_rank_is_sent_away_from_the_desk_after_a_while_and_at_the_groups_end():
    desk = new_desk()
    began = time.monotonic()
    assert desks.at_desk(desk.next_job.remote(0, 0, 0.3)) == (False, None)
    assert time.monotonic() - began >= 0.3
    waiting = desk.next_job.remote(0, 0, 60.0)
    desks.at_desk(desk.close.remote())
    assert desks.at_desk(waiting) == (True, None)


@pytest.mark.usefixtures("ray_session")
def test_a_rank_of_an_earlier_incarnation_can_neither_report_nor_commit_nor_end_the_job():
    from learners.rank import Line

    desk = new_desk()
    lines = [Line(desk, 0, desks.at_desk(desk.begin_incarnation.remote())) for _ in range(2)]
    earlier, present = (line.worker(1, None) for line in lines)
    desks.at_desk(desk.order.remote(desks.Ordered(1, b"")))
    outcome = desks.Outcome(1, result={})
    for act in (
        earlier.check_lease,
        earlier.should_stop,
        lambda: earlier.report(Progress("toy", 1, 1, "steps")),
        lambda: lines[0].finish(outcome),
        lambda: lines[0].next_job(0),
        lambda: lines[0].saved("step 1"),
        lines[0].enlist,
    ):
        with pytest.raises(desks.Superseded, match=r"incarnation 1 stops here and writes nothing more, 2 goes on"):
            act()
    assert desks.at_desk(desk.news.remote(0.0)) == desks.News([], None, 2, {}, {})
    present.check_lease()
    assert not present.should_stop()
    present.report(Progress("toy", 1, 1, "steps"))
    lines[1].finish(outcome)
    news = desks.at_desk(desk.news.remote(0.0))
    assert (len(news.progress), news.outcome) == (1, outcome), "negative control: the present one can"
