"""PPO's own train loop in a learner rank, which also says who it is and lingers in its phases."""

from typing import Any

import phases

from learners import ppo, ppo_recovery
from learners.ppo_job import PpoJob

train_ppo, write_checkpoint, publish = ppo.train_ppo, ppo_recovery.write_checkpoint, ppo._PpoLoop._publish


def train(job: PpoJob, worker: Any) -> dict[str, Any]:
    """What `train_ppo` does."""
    phases.register("learner")
    ppo_recovery.write_checkpoint = _write_checkpoint
    ppo._PpoLoop._publish = _publish  # pyright: ignore[reportAttributeAccessIssue]
    return train_ppo(job, worker)


def _publish(loop: Any) -> dict[str, float]:
    """At staleness 0 nothing is under way before the next publication: the stage is idle."""
    phases.brake(loop._progress.update)
    phases.linger("learner", "idle", loop._progress.update)
    return publish(loop)


def _write_checkpoint(root: Any, step: int, *given: Any, may_commit: Any, **named: Any) -> Any:
    def lingers() -> None:
        """Between the last file and the manifest, which commits them."""
        phases.linger("learner", "checkpointing", step)
        may_commit()

    return write_checkpoint(root, step, *given, may_commit=lingers, **named)
