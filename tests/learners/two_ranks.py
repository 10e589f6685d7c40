"""One of two ranks, run as `python two_ranks.py RANK DIRECTORY`: asserts within, leaves states for the test to read."""

import copy
import dataclasses
import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from plain_torch import STEPS, TinyNetwork, pieces, train_plain
from toy_ppo import TEMPERATURE, plan_of
from toy_rollouts import DirectRay, Handle, ToyConductor, stream_of

from learners import answers, ppo
from learners.engine import Engine, EngineSettings
from learners.optimizer import OptimizerSettings
from learners.process_group import any_rank, process_group
from learners.worker import Worker
from models import packing

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


class OthersStream:
    """What the second rank takes its batches from: the Parquet files of the first rank's stream."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, batch: int, timeout_s: float, attempt: int) -> pa.Table:
        path = self._directory / f"update-{batch + 1:06d}-attempt-{attempt}.parquet"
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            assert time.monotonic() < deadline, path
            time.sleep(0.01)
        return pq.read_table(path)


def train_ppo(job: ppo.PpoJob, worker: Worker) -> dict[str, Any]:
    """PPO on this rank: the first has stream and generator beside it, as the actors are elsewhere."""
    answers.ray = DirectRay
    if worker.rank == 0:
        stream = stream_of(plan_of(job.pretraining.parent, job.directory, job.settings))
        conductor = Handle(ToyConductor(stream, job.policy, TEMPERATURE))
    else:
        stream, conductor = OthersStream(job.directory / "episodes"), None
    return ppo.train_ppo(dataclasses.replace(job, stream=Handle(stream), conductor=conductor), worker)


def main(rank: int, directory: Path) -> None:
    packing.LENGTH_STEP = 1  # else toy batches are too short to be packed; the one rank in the test pads them
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
            moved = largest_difference(reference, dict(base.named_parameters()))
            assert largest_difference(engine.weights(), reference) < 0.2 * moved, (stage, moved)
            engine.close()
        worker = Worker(rank, 2, report=lambda progress: None, should_stop=lambda: False)
        for train, job in jobs:
            train = train_ppo if train is ppo.train_ppo else train
            results = train(job, worker)
            (directory / f"{job.directory.name}-rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
