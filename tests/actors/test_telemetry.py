"""Exports: only what is declared, as it is declared, and never twice."""

import time

import pytest
from recording_meter import RecordingMeter

from actors import telemetry
from actors.exported_metrics import (
    FLEET_LOSSES,
    LEARNER_KL,
    PUBLICATION_SECONDS,
    STREAM_SLOTS,
    STREAM_WAITING,
    WORKER_MEMORY,
    Kind,
    Metric,
)
from actors.telemetry import RayMeter, Telemetry, as_ascii


@pytest.fixture
def meter() -> RecordingMeter:
    return RecordingMeter()


@pytest.fixture
def stream(meter) -> Telemetry:
    return Telemetry("demo", "stream", meter=meter)


def test_every_measurement_has_the_labels_of_its_role(stream, meter):
    stream.set(STREAM_WAITING, 3)
    stream.of("generator", "g-1").set(WORKER_MEMORY, 5)
    labels = {name: dict(tags) for name, tags in meter.values}
    assert labels == {
        STREAM_WAITING.name: {"run": "demo", "role": "stream", "worker": ""},
        WORKER_MEMORY.name: {"run": "demo", "role": "generator", "worker": "g-1"},
    }


def test_what_is_not_declared_is_not_exported(stream, meter):
    with pytest.raises(ValueError, match="not declared"):
        stream.set(Metric("amenable_made_up", Kind.GAUGE, "x"), 1)
    with pytest.raises(ValueError, match="not declared"):  # the name is, with other labels
        stream.set(Metric(STREAM_WAITING.name, Kind.GAUGE, "x"), 1)
    copied = Metric(**{name: getattr(STREAM_WAITING, name) for name in Metric.__dataclass_fields__})
    stream.set(copied, 1)  # as it comes with an actor's class
    assert meter.of(STREAM_WAITING) == 1


def test_a_metric_is_used_as_its_kind_and_with_its_tags(stream, meter):
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        stream.add(STREAM_WAITING, 1)
    with pytest.raises(ValueError, match="is a counter, not a gauge"):
        stream.set(FLEET_LOSSES, 1)
    with pytest.raises(ValueError, match="has the tags"):
        stream.set(LEARNER_KL, 1)
    with pytest.raises(ValueError, match="has the tags"):
        stream.set(STREAM_WAITING, 1, stage="ppo")
    with pytest.raises(ValueError, match="cannot fall"):
        stream.add(FLEET_LOSSES, -1)
    assert meter.history == []


def test_counters_do_not_grow_by_nothing_which_ray_refuses(stream, meter):
    stream.add(FLEET_LOSSES, 0)
    stream.count_to(FLEET_LOSSES, 0)
    assert meter.history == []


def test_a_count_that_is_kept_elsewhere_grows_by_what_is_new(stream, meter):
    for total in (3, 3, 7, 5, 8):
        stream.count_to(STREAM_SLOTS, total, outcome="leased")
    stream.count_to(STREAM_SLOTS, 2, outcome="trained")
    assert meter.of(STREAM_SLOTS, outcome="leased") == 8
    assert meter.of(STREAM_SLOTS, outcome="trained") == 2


def test_what_was_counted_before_this_process_is_not_counted_again(stream, meter):
    stream.count_from(STREAM_SLOTS, 100, outcome="leased")
    stream.count_to(STREAM_SLOTS, 100, outcome="leased")
    assert meter.of(STREAM_SLOTS) is None
    stream.count_to(STREAM_SLOTS, 104, outcome="leased")
    assert meter.of(STREAM_SLOTS) == 4


def test_text_of_labels_is_escaped_where_ray_would_fail():
    assert as_ascii("plain-1.5") == "plain-1.5"
    assert as_ascii("démo") == "d\\xe9mo"


# Ray's meter --------------------------------------------------------------------------------------------------------


def test_a_process_outside_ray_exports_nothing():
    meter = RayMeter()
    Telemetry("demo", "stream", meter=meter).set(STREAM_WAITING, 3)
    assert meter._made == {}
    assert meter._refreshes is None


class Handed(RayMeter):
    """Ray's meter, with what it hands over in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[tuple[str, float]] = []

    def _hand_over(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        self.handed.append((metric.name, value))

    def count(self, metric: Metric) -> int:
        return sum(name == metric.name for name, _ in self.handed)


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the gauge was not handed over in time"
        time.sleep(0.01)


def test_gauges_are_handed_over_again_and_again_until_they_are_cleared(monkeypatch):
    monkeypatch.setattr(telemetry.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "REFRESH_S", 0.01)
    meter = Handed()
    exports = Telemetry("demo", "stream", meter=meter)
    exports.add(FLEET_LOSSES, 2)
    exports.observe(PUBLICATION_SECONDS, 2.0)
    exports.set(WORKER_MEMORY, 5)  # does not last: its process says it again itself
    exports.set(STREAM_WAITING, 3)
    exports.set(STREAM_WAITING, 4)
    until(lambda: meter.count(STREAM_WAITING) > 5)
    assert meter.handed[-1] == (STREAM_WAITING.name, 4.0)
    assert [meter.count(each) for each in (FLEET_LOSSES, PUBLICATION_SECONDS, WORKER_MEMORY)] == [1, 1, 1]
    exports.clear(STREAM_WAITING)
    time.sleep(0.2)
    count = meter.count(STREAM_WAITING)
    time.sleep(0.2)
    assert meter.count(STREAM_WAITING) == count
