"""Metrics to Weights & Biases beside metrics.jsonl and TensorBoard, where a recipe asks for it.

Each stage that trains is one W&B run, because W&B counts steps upwards alone: its id is the run's own and the stage,
so that whoever goes on with the run goes on with it there, and its group is the run. Only metrics are sent, under the
names that they have everywhere. The key is read from the environment, by wandb itself, and stands in no recipe.
"""

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from corpus.problems import RunProblem, UsageProblem

KEY = "WANDB_API_KEY"
FINISH_S = 30.0
"""Seconds for the last metrics of a stage to be sent: half of what a preempted node gives. House default."""

log = logging.getLogger(__name__)


class WandbSettings(BaseModel):
    """Where metrics go on Weights & Biases. The key is WANDB_API_KEY of the learners' environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = Field(min_length=1, description="The project, which W&B makes where there is none.")
    entity: str | None = Field(
        default=None, description="The user or team that has the project. None: the key's own. W&B's default."
    )
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="online sends as the run goes on; offline writes to STAGE/wandb, for `wandb sync`. W&B's default.",
    )


class TrackingSettings(BaseModel):
    """Trackers beside metrics.jsonl and TensorBoard, which every run has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wandb: WandbSettings | None = Field(
        default=None, description="Weights & Biases; needs `pip install wandb`. None: nothing is sent. House default."
    )


@dataclass(frozen=True)
class Tracked:
    """What a learner's job is told: where metrics go, the run's name and its id, which no other run has."""

    wandb: WandbSettings
    run: str
    run_id: str


def check_wandb(settings: WandbSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageProblem where wandb is not installed here, or its key is not in the environment."""
    if find_spec("wandb") is None:
        raise UsageProblem(
            "tracking.wandb is set and the package wandb is not installed; pip install wandb where the learners run, "
            "or leave tracking.wandb out.",
            "tracking/package",
        )
    if settings.mode == "online" and not environment.get(KEY):
        raise UsageProblem(
            f"tracking.wandb.mode is online and {KEY} is not set where the learners run; set it there (never in a "
            "recipe), or give tracking.wandb.mode=offline.",
            "tracking/key",
        )


class WandbRun:
    """One stage's metrics on W&B."""

    def __init__(self, tracked: Tracked, stage: str, directory: Path) -> None:
        """Begins it, or goes on with it. Raises as `check_wandb`, and RunProblem where W&B does not take it."""
        settings = tracked.wandb
        check_wandb(settings)
        import wandb  # pyright: ignore[reportMissingImports] - not part of the installation

        self._is_lost = False
        try:
            self._run: Any = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                id=f"{tracked.run_id}-{stage}",
                name=f"{tracked.run} {stage}",
                group=tracked.run_id,
                job_type=stage,
                resume="allow",
                dir=str(directory),
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    save_code=False,
                    disable_git=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:  # of W&B, of its settings, of the disk
            raise RunProblem(
                f"Weights & Biases did not take the run ({' '.join(str(error).split())[:300]}); mend that, or give "
                "tracking.wandb.mode=offline, and the same command continues.",
                "tracking/refused",
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one step. Steps that W&B has already, of an attempt that was lost, stay there as they were. Where
        W&B fails from here on, training goes on without it."""
        if self._is_lost:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # noqa: BLE001 - a tracker's: metrics.jsonl has the same
            self._is_lost = True
            log.warning("Weights & Biases takes no more metrics of this stage: %r", error)

    def close(self) -> None:
        """Ends it; what has not been sent yet is sent, if that takes no longer than FINISH_S: a checkpoint that others
        wait for may have been the last thing before."""

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("Weights & Biases did not take the end of this stage: %r", error)

        finishing = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        finishing.start()
        finishing.join(FINISH_S)
        if finishing.is_alive():
            log.warning("Weights & Biases had not taken all metrics of this stage within %g s", FINISH_S)
