import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_torch import TinyNetwork, train_plain
from two_ranks import OPTIMIZER, largest_difference

from learners.engine import Engine, EngineSettings

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Runs two_ranks.py as two processes and gives their directory."""
    directory = tmp_path_factory.mktemp("two_ranks")
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "two_ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory)],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_plain_torch_does_in_one_process(two_ranks, stage):
    torch.manual_seed(0)
    reference, _ = train_plain(TinyNetwork(), OPTIMIZER)
    states = [torch.load(two_ranks / f"stage-{stage}-rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in states:
        assert largest_difference(state["weights"], reference) < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_state_of_two_ranks_is_that_of_one(two_ranks, stage):
    torch.manual_seed(0)
    base = TinyNetwork()
    state = torch.load(two_ranks / f"stage-{stage}-rank-0.pt", weights_only=True)
    engine = Engine(copy.deepcopy(base), EngineSettings(), OPTIMIZER, 0)
    engine.load_state(state)
    again = engine.state()
    engine.close()
    assert again["steps"] == state["steps"] == 5
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        assert largest_difference(again[key], state[key]) == 0
