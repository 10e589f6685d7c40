"""One of two ranks, run as `python two_ranks.py RANK DIRECTORY`: asserts within, leaves states for the test to read."""

import copy
import json
import pickle
import sys
from pathlib import Path

import torch
from plain_torch import STEPS, TinyNetwork, pieces, train_plain

from learners.engine import Engine, EngineSettings
from learners.optimizer import OptimizerSettings
from learners.process_group import any_rank, process_group
from learners.worker import Worker

OPTIMIZER = OptimizerSettings(peak_lr=1e-2, gradient_clip=1.0, weight_decay=0.1)


def largest_difference(weights: dict, others: dict) -> float:
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def step(engine: Engine, number: int, rank: int, microbatches: int) -> float:
    """A PPO-like and a γ × ptx-like loss, each in `microbatches` on each rank, then one optimiser step."""
    for kind in (0, 1):
        for piece in range(microbatches):
            engine.backward(pieces(engine, number, kind, rank * microbatches + piece, 2 * microbatches))
    return engine.step(1e-2)


def main(rank: int, directory: Path) -> None:
    torch.manual_seed(0)
    base = TinyNetwork()
    reference, norms = train_plain(copy.deepcopy(base), OPTIMIZER)
    jobs = pickle.loads((directory / "jobs.pickle").read_bytes())
    with process_group(rank, 2, str(directory / "store")):
        assert any_rank(rank == 1)
        previous = None
        for stage in (0, 1, 2, 3):
            engine = Engine(copy.deepcopy(base), EngineSettings(zero_stage=stage), OPTIMIZER, 0)
            found = [step(engine, number, rank, microbatches=3) for number in range(STEPS)]
            assert max(abs(a / b - 1) for a, b in zip(found, norms, strict=True)) < 1e-5, (stage, found, norms)
            assert largest_difference(engine.weights(), reference) < 1e-6, stage
            state = engine.state()
            torch.save(state, directory / f"stage-{stage}-rank-{rank}.pt")
            if previous is not None:  # the state of the stage before continues here
                engine.load_state(previous)
                for key in ("weights", "exp_avg", "exp_avg_sq"):
                    assert largest_difference(engine.state()[key], previous[key]) == 0, (stage, key)
                step(engine, STEPS, rank, 1)
            engine.close()
            previous = state
        for stage in (0, 3):
            engine = Engine(copy.deepcopy(base), EngineSettings(zero_stage=stage, dtype="bfloat16"), OPTIMIZER, 0)
            for number in range(STEPS):
                step(engine, number, rank, 1)
            assert largest_difference(engine.weights(), reference) < 0.1, stage
            engine.close()
        worker = Worker(rank, 2, report=lambda progress: None, should_stop=lambda: False)
        for train, job in jobs:
            results = train(job, worker)
            (directory / f"{job.directory.name}-rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
