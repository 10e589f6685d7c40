"""Two real ranks that wait: whatever either meets, both leave the wait at the same look."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_ranks_leave_a_wait_together(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "waiting_ranks.py"), str(rank), str(tmp_path / "store")],
            env=environment | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        first, second = (rank.communicate(timeout=120)[0].splitlines() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    together = [
        "both come, one late: came",
        "who has its answer waits for a stop of the other: stopped",
        "a stop of one ends both: stopped",
    ]
    together += ["one fails: its desk is gone"]  # on both: either may be heard first
    together += ["what an actor has raised: a batch is late"]
    died = "its process was killed or crashed; the same command continues from what was last saved."
    assert first == [*together, f"an actor has died: A process of the run died: {died}", "one is late: late"]
    assert second == [*together, "an actor has died: ActorDiedError", "one is late: late"]
