"""One of two ranks, run as `python failing_ranks.py RANK DIRECTORY`: trains PPO beside a stream that has died, and
prints the problem that it ends with."""

import dataclasses
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from toy_ppo import TEMPERATURE, plan_of
from toy_rollouts import DirectRay, Handle, ToyConductor, stream_of

from corpus.problems import RunProblem
from learners import answers, ppo
from learners.worker import Worker


class DeadStream:
    """Neither gives a batch nor its state; of what is called before that only `advance` does anything."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def lease(self, holder: str, chunks: int, wait_s: float) -> list[Any]:
        return []

    async def advance(self, attempt: int, version: int) -> None:
        await self._stream.advance(attempt, version)

    async def take(self, batch: int, timeout_s: float, attempt: int) -> None:
        raise RunProblem("the stream died", "run/process-died")

    async def state(self, attempt: int) -> None:
        raise RunProblem("the stream has no state any more", "run/process-died")


def main(rank: int, directory: Path) -> None:
    answers.ray = DirectRay
    job: ppo.PpoJob = pickle.loads((directory / "job.pickle").read_bytes())
    stream = DeadStream(stream_of(plan_of(job.pretraining.parent, job.directory, job.settings)))
    conductor = Handle(ToyConductor(stream, job.policy, TEMPERATURE)) if rank == 0 else None
    # Ranks that are in different collectives wait for each other: for a minute here, and not for half an hour.
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    worker = Worker(rank, 2, report=lambda progress: None, should_stop=lambda: False)
    try:
        ppo.train_ppo(dataclasses.replace(job, stream=Handle(stream), conductor=conductor), worker)
    except Exception as problem:  # noqa: BLE001 - printed, for the test to compare
        print(f"{type(problem).__name__}: {problem}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
