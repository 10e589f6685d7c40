"""The recovery unit of PPO: learner and stream, which one checkpoint holds.

Its manifest is the commit, and a restart returns both to it under a new attempt.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.attempts import DIRECTORY as ATTEMPTS
from actors.attempts import SavedProgress, begin_attempt, read_attempts, write_trained
from actors.episodes import EPISODE
from corpus import logs
from learners.agreed_checkpoint import load_agreed
from learners.answers import Answers
from learners.checkpoint import Checkpoint, write_checkpoint
from learners.checkpoint_place import CheckpointPlace, checkpoints_of
from learners.ema import WeightAverage
from learners.engine import MOMENTS, Engine
from learners.ppo_held_out import HeldOutEvaluations
from learners.ppo_job import PpoJob
from learners.process_group import any_rank, problem_of_ranks, sum_over_ranks
from learners.worker import Worker


@dataclass
class Progress:
    """What a checkpoint carries beside tensors and the stream."""

    attempt: int = 0
    update: int = 0
    kl_coefficient: float = 0.0
    stopped_by: str = ""

    @property
    def version(self) -> tuple[int, int]:
        """Attempt and update, by which weights are known."""
        return self.attempt, self.update


class RecoveryUnit:
    """Learner and stream of a PPO stage, as they are saved and gone on from. Every rank takes part in both."""

    def __init__(
        self,
        job: PpoJob,
        worker: Worker,
        policy: Engine,
        value: Engine,
        average: WeightAverage,
        held_out: HeldOutEvaluations,
        answers: Answers,
        progress: Progress,
    ) -> None:
        """Whatever is given is what `resume` brings to the state of a checkpoint, and `save` reads."""
        self._job, self._worker, self._settings = job, worker, job.settings
        self._policy, self._value, self._average = policy, value, average
        self._held_out, self._answers, self._progress = held_out, answers, progress
        self._first = worker.rank == 0
        self._checkpoints = checkpoints_of(job.directory, job.stored)
        self._unreadable: frozenset[str] = frozenset()
        """Names of checkpoints that could not be gone on from."""
        self._saved: SavedProgress | None = None
        """What the newest checkpoint says, written or gone on from; of rank 0 alone."""
        self.checkpoint_s: float | None = None
        """Seconds that the last checkpoint took; None before there is one."""

    def resume(self) -> None:
        """Begin an attempt: from the newest checkpoint of the same inputs, or, where there is none, from nothing."""
        checkpoint = load_agreed(self._checkpoints, self._job.identity)
        number = 0
        if self._first:
            self._worker.check_lease()
            if checkpoint is None:
                self._start_anew()
            start, parent = (0, None) if checkpoint is None else (checkpoint.step, checkpoint.data["attempt"])
            epoch = self._worker.run_epoch
            number = begin_attempt(self._job.directory, start, epoch, parent, self._job.identity).number
            if self._job.stored is not None:  # before it publishes: on another machine the number must be taken too
                self._job.stored.push(self._worker.check_lease)
        self._progress.attempt = int(sum_over_ranks(number)[0])
        logs.note_attempt(self._progress.attempt)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self._first and number > 0:  # a stream that lives may hold what an attempt before this one left
            restored = self._job.stream.restore.remote(None, None, number)
            self._answers.of(restored, "the stream to go back to the beginning")

    def save(self) -> None:
        """A checkpoint of learner and stream, and of the weights that held-out evaluations under way speak of.

        Raises on every rank what the first one, which writes it, meets: none is left in a collective that the others
        never come to."""
        began = time.monotonic()
        states = {"policy": self._policy.state(), "value": self._value.state()}
        problem: Exception | None = None
        if self._first:
            try:
                self._write(states)
            except Exception as met:  # noqa: BLE001 - raised below, once the other ranks know
                problem = met
        if any_rank(problem is not None):
            raise problem_of_ranks(problem)
        self.checkpoint_s = time.monotonic() - began

    def leave_record(self) -> None:
        """Once all is trained: what the newest checkpoint says, beside the attempts, where it outlives the checkpoints.
        Rank 0 alone calls this."""
        assert self._saved is not None, "training ends with a checkpoint"
        self._worker.check_lease()
        write_trained(self._job.directory, self._saved)

    def _write(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """A checkpoint of the engines' states, by network, and of what the stream has now; rank 0 alone writes it."""
        kept = self._job.stream.state.remote(self._progress.attempt)
        ledger, episodes = self._answers.of(kept, "the stream's state")
        tensors = {f"{name}-{part}": state[part] for name, state in states.items() for part in ("weights", *MOMENTS)}
        progress = self._progress
        data = {
            "identity": self._job.identity,
            "attempt": progress.attempt,
            "steps": {name: state["steps"] for name, state in states.items()},
            "kl_coefficient": progress.kl_coefficient,
            **self._held_out.state(),
            "stopped_by": progress.stopped_by,
            "ledger": ledger,
        }
        self._worker.check_lease()
        if self._job.stored is not None:  # the episodes that the checkpoint calls trained, figures, candidates
            self._job.stored.push(self._worker.check_lease)
            self._worker.check_lease()
        write_checkpoint(
            self._checkpoints,
            progress.update,
            {**tensors, "ema": self._average.weights, **self._held_out.tensors()},
            data,
            {"episodes": episodes},
            keep=self._settings.checkpoints_kept,
            pinned=self._held_out.best.updates,
            unreadable=self._unreadable,
            may_commit=self._worker.check_lease,
        )
        self._saved = SavedProgress.of(progress.update, data, episodes["slot"].to_pylist())
        self._held_out.best.forget_others()

    def _start_anew(self) -> None:
        """Remove what other inputs left, but for what nobody but a person may remove; what attempts of the same inputs
        have done is kept as their record."""
        CheckpointPlace(self._checkpoints).remove_all()
        if any(each.identity != self._job.identity for each in read_attempts(self._job.directory)):
            for name in (ATTEMPTS, "episodes"):
                shutil.rmtree(self._job.directory / name, ignore_errors=True)
        self._held_out.start_anew()

    def _restore(self, checkpoint: Checkpoint) -> None:
        data, tensors = checkpoint.data, checkpoint.tensors
        for name, engine in (("policy", self._policy), ("value", self._value)):
            parts = {moment: tensors[f"{name}-{moment}"] for moment in ("weights", *MOMENTS)}
            engine.load_state({**parts, "steps": data["steps"][name]})
        self._average.weights = dict(tensors["ema"])
        self._unreadable = checkpoint.passed_over
        self._progress.update = checkpoint.step
        self._progress.kl_coefficient = data["kl_coefficient"]
        self._progress.stopped_by = data["stopped_by"]
        self._held_out.restore(data, checkpoint.step)
        if self._first:
            episodes = checkpoint.tables["episodes"].cast(EPISODE)
            self._saved = SavedProgress.of(checkpoint.step, data, episodes["slot"].to_pylist())
            restored = self._job.stream.restore.remote(data["ledger"], episodes, self._progress.attempt)
            self._answers.of(restored, "the stream to go back to the checkpoint")
            self._held_out.forget_what_followed()
            self._held_out.begin_again(self._progress.attempt, data, tensors)
            due = checkpoint.step % self._settings.evaluate_every == 0 and checkpoint.step < self._settings.updates
            if due and not data["stopped_by"] and not self._held_out.is_known(checkpoint.step):
                # The policy that it found is gone; the average is the same.
                self._held_out.begin(self._progress.version, self._average.weights)
