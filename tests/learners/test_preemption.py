"""A machine that is about to be taken away, as Ray itself tells of it: a node of a real cluster is drained under a real
group of Ray Train's."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import group_jobs
import pytest

from learners.desk import at_desk
from learners.group import LearnerGroup, Patience
from learners.ranks import Ranks
from learners.worker import Progress

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(400)]

DRAIN_S = 20.0
"""Seconds until the node is gone: the rank asks every 5, and has to save within them."""
STARTS = 3


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Any]:
    """A cluster whose head has no CPU, so that no rank lies there."""
    from cluster.session import ENVIRONMENT, session

    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()]),  # for group_jobs
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_prestart_worker_first_driver": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = begun()
    try:
        with session(found.address, cpus=1):
            yield found
    finally:
        found.shutdown()


def begun() -> Any:
    """Ray gives a node's processes 30 s, which is short on a machine that is busy; so it is tried more than once."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(STARTS)):
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=0, include_dashboard=False)
            return nodes
        except Exception as error:  # Ray raises a plain one
            nodes.shutdown()
            if "timed out during startup" not in str(error) or not left:
                raise
    raise AssertionError


def drain(address: str, node: str) -> None:
    """As a cloud does that takes the machine back."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gone_at_ms = int(1000 * (time.time() + DRAIN_S))
    is_accepted, why = GcsClient(address=address).drain_node(node, reason, "the test takes it back", gone_at_ms)
    assert is_accepted, why


class Group(LearnerGroup):
    def wait_until_led(self) -> None:
        """Until Ray Train has begun to lead the group."""
        give_up = time.monotonic() + 120
        while at_desk(self._desk.controller.remote()) is None:
            assert time.monotonic() < give_up, "Ray Train did not begin"
            time.sleep(0.2)


def never() -> bool:
    return False


def test_a_rank_whose_node_is_drained_saves_in_time_and_goes_on_elsewhere(nodes, tmp_path):
    notes: list[str] = []
    patience = Patience(180, max_restarts=0)  # the machine's loss is none of those that are counted
    with Group(Ranks(1, 1), str(tmp_path), patience, note=notes.append) as group:
        # What leads the group is on the head already, or it might lie on the node that goes.
        group.wait_until_led()
        first = nodes.add_node(num_cpus=1, include_dashboard=False).node_id
        group.wait_until_ready(never)
        second = nodes.add_node(num_cpus=1, include_dashboard=False).node_id
        drained: list[str] = []

        def drain_once(progress: Progress) -> None:
            if not drained:
                drain(nodes.address, first)
                drained.append(first)

        result = group.run(group_jobs.saves_before_its_machine_goes, tmp_path / "saved", drain_once, never)
    assert result == {"saved_on": first, "node": second}
    assert notes[0] == (
        "learners saved at toy, step 3 of 10: their machine is about to be taken away; they go on elsewhere"
    )
    assert [note for note in notes[1:] if " of 0)" in note] == []
    assert "taken away" in notes[-1]
