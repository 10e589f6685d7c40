"""The loop that base, SFT, ppo-init and reward-model training share: minibatches in a fixed order, one step for each.

Invariants:
- What a step does is a function of the job and the step number, so a run that goes on from a checkpoint repeats the
  uninterrupted one: bitwise on a CPU in float32.
- All ranks leave the loop at the same step.
- The checkpoint of the last step stays: whoever commits the results removes it.
"""

import logging
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from actors.telemetry import Telemetry
from corpus.problems import RunProblem
from corpus.stored_directory import StoredDirectory
from learners.agreed_checkpoint import load_agreed
from learners.checkpoint import write_checkpoint
from learners.checkpoint_place import CheckpointPlace, checkpoints_of
from learners.engine import MOMENTS, Engine
from learners.exported_figures import ExportedFigures
from learners.metrics import MetricsLog
from learners.optimizer import OptimizerSettings
from learners.process_group import any_rank, sum_over_ranks
from learners.tracking import Tracked, WandbRun
from learners.worker import Interrupted, Reporter, Worker

log = logging.getLogger(__name__)


class Task(Protocol):
    """What a loop trains on. Steps are counted from 0."""

    stage: str
    total_steps: int
    results: dict[str, Any]
    """Plain JSON that checkpoints carry: what `after_step` has found so far."""

    def losses(self, step: int) -> Iterator[Tensor]:
        """This rank's share of the loss of minibatch `step`, one for each micro-batch, as many on every rank."""
        ...

    def tokens(self, step: int) -> int:
        """Real tokens of the whole minibatch `step`, over all ranks."""
        ...

    def after_step(self, steps_done: int) -> dict[str, float]:
        """Validation and exports that are due after `steps_done` steps; returns numbers for the metrics."""
        ...


class SupervisedLoop:
    """Trains `task` on `engine`, writing metrics and checkpoints below `directory`.

    A checkpoint of the same `identity` (a hash of all that the job reads) is continued; of others all are removed
    that no person pinned. Where an object store keeps the run, `stored` says so: checkpoints go there, and before each
    all that they refer to.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        optimizer: OptimizerSettings,
        worker: Worker,
        directory: Path,
        identity: str,
        checkpoint_seconds: float,
        stored: StoredDirectory | None = None,
        tracked: Tracked | None = None,
    ) -> None:
        self._task, self._engine, self._optimizer, self._worker = task, engine, optimizer, worker
        self._directory, self._identity, self._stored = directory, identity, stored
        self._checkpoints = checkpoints_of(directory, stored)
        self._checkpoint_seconds = checkpoint_seconds
        self._tracked = tracked
        self._unreadable: frozenset[str] = frozenset()
        """Names of checkpoints that could not be gone on from."""
        self._step = self._saved_step = 0
        self._reporter = Reporter(worker, task.stage, task.total_steps, "steps")
        self._values: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Trains to the end; returns steps, tokens, seconds, tokens_per_s and peak_memory_bytes of this process's part.

        Raises Interrupted where the worker was asked to stop, RunProblem where loss or gradient is not finite; both
        after a checkpoint.
        """
        owed = self._resume()
        first_step, tokens, seconds = self._step, 0, 0.0
        saved = time.monotonic()
        metrics = None
        if self._worker.rank == 0:
            tracked = self._tracked
            tracker = WandbRun(tracked, self._task.stage, self._directory) if tracked is not None else None
            telemetry = Telemetry(self._worker.run, "learner", "rank-0")
            metrics = MetricsLog(
                self._directory,
                self._step - (owed is not None) or None,
                ExportedFigures(telemetry, self._task.stage, self._task.total_steps),
                tracker,
            )
        try:
            while owed is not None or self._step < self._task.total_steps:
                if owed is None:
                    began = time.monotonic()
                    owed = self._one_step()
                    took = time.monotonic() - began
                    tokens += self._task.tokens(self._step - 1)
                    seconds += took
                    owed["tokens_per_s"] = self._task.tokens(self._step - 1) / took
                    owed["peak_memory_bytes"] = peak_memory_bytes()
                    if self._step == self._task.total_steps:
                        self._save(owed)  # validation and export can fail; the training is not to be lost with them
                values, owed = owed | self._task.after_step(self._step), None
                self._values |= values
                if metrics is not None:
                    if self._stored is None:  # else the lines are this machine's own until they are sent
                        self._worker.check_lease()
                    metrics.log(self._step, values)
                self._reporter.report(self._step, self._values, now=self._step == self._task.total_steps)
                if self._step == self._task.total_steps:
                    break
                stop = self._worker.agreed_to_stop()
                if stop or any_rank(time.monotonic() - saved > self._checkpoint_seconds):
                    self._save(None)
                    saved = time.monotonic()
                if stop:
                    raise Interrupted(f"{self._task.stage}, step {self._step} of {self._task.total_steps}")
        finally:
            if metrics is not None:
                metrics.close()
        dist.barrier()  # nobody reports success before rank 0 has written its last export
        return {
            "steps": self._step - first_step,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _one_step(self) -> dict[str, float]:
        share = 0.0
        for loss in self._task.losses(self._step):
            self._engine.backward(loss)
            share += loss.item()
            self._reporter.report(self._step, self._values)
        [total] = sum_over_ranks(share)
        lr = self._optimizer.learning_rate(self._step, self._task.total_steps)
        try:  # what is raised here is raised on every rank, and the state is that of the step before
            if not math.isfinite(total):
                raise RunProblem(
                    f"{self._task.stage}: the loss is {total} at step {self._step + 1}; lower the learning rate.",
                    "learners/not-finite",
                )
            norm = self._engine.step(lr)
        except RunProblem:
            self._save_what_is_trained()
            raise
        self._step += 1
        return {"loss": total, "lr": lr, "grad_norm": norm}

    def _resume(self) -> dict[str, float] | None:
        """Goes to the newest checkpoint; returns the figures of its step where `after_step` is still to follow it."""
        self._reporter.report(0, now=True)
        checkpoint = load_agreed(self._checkpoints, self._identity)
        if checkpoint is None:
            place = CheckpointPlace(self._checkpoints)
            if self._worker.rank == 0 and place.names():
                self._worker.check_lease()
                place.remove_all()
            return None
        self._engine.load_state({**checkpoint.tensors, "steps": checkpoint.step})
        self._task.results.update(checkpoint.data["results"])
        self._step = self._saved_step = checkpoint.step
        self._unreadable = checkpoint.passed_over
        return checkpoint.data["owed"]

    def _save_what_is_trained(self) -> None:
        """A checkpoint of the steps so far, unless the newest one holds them."""
        if self._step == self._saved_step:
            return
        try:
            self._save(None)
        except RunProblem as second:  # why the training ends is what a person must hear of
            log.warning("no checkpoint could be written at step %d: %s", self._step, second)

    def _save(self, owed: dict[str, float] | None) -> None:
        state = self._engine.state()
        if self._worker.rank == 0:
            self._worker.check_lease()
            groups = {name: state[name] for name in ("weights", *MOMENTS)}
            data = {"identity": self._identity, "results": self._task.results, "owed": owed}
            if self._stored is not None:  # who goes on from the checkpoint elsewhere needs exports and figures
                self._stored.push(self._worker.check_lease)
                self._worker.check_lease()
            write_checkpoint(
                self._checkpoints,
                self._step,
                groups,
                data,
                unreadable=self._unreadable,
                may_commit=self._worker.check_lease,
            )
        dist.barrier()
        self._saved_step = self._step


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on the CUDA device where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
