import dataclasses

import pytest
from recording_worker import RecordingWorker

from corpus.problems import RunProblem
from learners import worker as workers
from learners.worker import Reporter, Worker


def test_reports_come_at_most_once_a_second_but_for_those_that_are_due_now(worker, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    reporter = Reporter(worker, "sft", 10, "steps")
    for done, seconds in enumerate([0.0, 0.5, 0.4, 0.2, 0.1, 1.1]):
        clock[0] += seconds
        reporter.report(done)
    reporter.report(10, {"loss": 1.0}, now=True)
    assert [progress.done for progress in worker.reports] == [0, 3, 5, 10]
    assert worker.reports[-1].values == {"loss": 1.0}


@pytest.mark.usefixtures("one_process")
def test_one_rank_alone_agrees_with_itself():
    worker = RecordingWorker(stop_after=2)
    assert [worker.agreed_to_stop() for _ in range(3)] == [False, True, True]


def test_a_worker_without_a_lease_has_nothing_to_check_and_one_with_a_lost_one_may_not_commit(worker):
    def lost() -> None:
        raise RunProblem("taken over", "run/unexpected")

    worker.check_lease()
    with pytest.raises(RunProblem, match="taken over"):
        dataclasses.replace(Worker(0, 1, worker.report, worker.should_stop), check_lease=lost).check_lease()
