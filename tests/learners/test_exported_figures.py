"""What learners export of a stage: figures while it trains, and none after it."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "actors"))
from recording_meter import RecordingMeter

from actors.exported_metrics import (
    LEARNER_KL,
    LEARNER_KL_BUDGET,
    LEARNER_KL_TARGET,
    LEARNER_LOSS,
    LEARNER_NON_FINITE,
    LEARNER_STEP,
    LEARNER_STEP_TIMESTAMP,
    LEARNER_STEPS_WANTED,
    LEARNER_UPDATE_SECONDS,
)
from actors.telemetry import Telemetry
from learners.exported_figures import ExportedFigures
from learners.metrics import MetricsLog


@pytest.fixture
def meter() -> RecordingMeter:
    return RecordingMeter()


def exported(meter: RecordingMeter, **bounds: float | None) -> ExportedFigures:
    return ExportedFigures(Telemetry("demo", "learner", "rank-0", meter), "ppo", 20, **bounds)


def test_a_line_of_metrics_is_exported_too(tmp_path, meter):
    with MetricsLog(tmp_path, 4, exported(meter, kl_target_nats=6.0)) as log:
        assert meter.of(LEARNER_STEP) == 4
        assert meter.of(LEARNER_STEPS_WANTED) == 20
        assert meter.of(LEARNER_KL_TARGET) == 6.0
        assert meter.of(LEARNER_KL_BUDGET) is None
        began = meter.of(LEARNER_STEP_TIMESTAMP)
        log.log(5, {"objective/kl": 2.5, "loss/ptx": 3.0, "loss/policy_avg": -1.0, "time/update": 7.0, "unknown": 1.0})
        assert meter.of(LEARNER_STEP, run="demo", role="learner", worker="rank-0", stage="ppo") == 5
        assert (meter.of(LEARNER_STEP_TIMESTAMP) or 0) >= (began or math.inf) > 1e9
        assert meter.of(LEARNER_KL) == 2.5
        assert meter.of(LEARNER_LOSS, part="ptx") == 3.0
        assert meter.of(LEARNER_LOSS, part="policy") == -1.0
        assert meter.observed == {LEARNER_UPDATE_SECONDS.name: [7.0]}
    assert meter.values == {}, "after the stage its process lives on, and would export them for ever"


def test_figures_that_are_not_finite_are_counted(meter):
    figures = exported(meter)
    figures.begin(0)
    figures.step(1, {"objective/kl": 1.0})
    assert meter.of(LEARNER_NON_FINITE) is None
    figures.step(2, {"objective/kl": math.nan, "lr": -math.inf, "loss/ptx": 1.0})
    assert meter.of(LEARNER_NON_FINITE, stage="ppo") == 2


def test_a_log_without_exports_writes_as_ever(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 2.0})
    assert '"loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()
