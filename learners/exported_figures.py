"""What learners export of a stage: the figures of each line of metrics.jsonl, and whether the stage gets on."""

import math
import time
from collections.abc import Mapping

from actors.exported_metrics import (
    LEARNER_KL_BUDGET,
    LEARNER_KL_TARGET,
    LEARNER_NON_FINITE,
    LEARNER_STEP,
    LEARNER_STEP_TIMESTAMP,
    LEARNER_STEPS_WANTED,
    Kind,
    Metric,
    metrics_of,
)
from actors.telemetry import Telemetry


class ExportedFigures:
    """Of one stage. One process of a group makes one."""

    def __init__(
        self,
        telemetry: Telemetry,
        stage: str,
        steps_wanted: int,
        kl_target_nats: float | None = None,
        kl_budget_nats: float | None = None,
    ) -> None:
        """The KL of PPO, in nats a sequence: what it is steered to, and beyond which it stops; None where it is not."""
        self._telemetry, self._stage, self._steps_wanted = telemetry, stage, steps_wanted
        self._bounds = ((LEARNER_KL_TARGET, kl_target_nats), (LEARNER_KL_BUDGET, kl_budget_nats))
        self._shown: dict[str, tuple[Metric, Mapping[str, str]]] = {}
        """Gauges that have been set, by name and tags."""

    def begin(self, step: int) -> None:
        """The stage trains from now on, with `step` steps behind it."""
        self._set(LEARNER_STEPS_WANTED, {}, self._steps_wanted)
        for metric, bound in self._bounds:
            if bound is not None:
                self._set(metric, {}, bound)
        self._at(step)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """What `step` came to. Figures that are infinite or not a number are counted: alerts compare, and with not a
        number no comparison holds."""
        self._telemetry.add(
            LEARNER_NON_FINITE, sum(not math.isfinite(value) for value in figures.values()), stage=self._stage
        )
        for metric, tags, value in metrics_of(figures):
            if metric.kind is Kind.HISTOGRAM:
                self._telemetry.observe(metric, value, stage=self._stage, **tags)
            else:
                self._set(metric, tags, value)
        self._at(step)

    def end(self) -> None:
        """The stage trains no longer: the process lives on, and its figures are the stage's no more."""
        for metric, tags in self._shown.values():
            self._telemetry.clear(metric, stage=self._stage, **tags)
        self._shown.clear()

    def _at(self, step: int) -> None:
        self._set(LEARNER_STEP, {}, step)
        self._set(LEARNER_STEP_TIMESTAMP, {}, time.time())

    def _set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None:
        self._shown[f"{metric.name}{dict(tags)}"] = metric, tags
        self._telemetry.set(metric, value, stage=self._stage, **tags)
