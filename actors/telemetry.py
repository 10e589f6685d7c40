"""How a process exports its metrics: through Ray, whose agent on the node Prometheus reads.

Only what `actors.exported_metrics` declares can be exported. A process outside Ray exports nothing.
"""

import logging
import os
import threading
import time
from functools import cache
from typing import Any, Protocol

import ray

from actors.exported_metrics import (
    WORKER_BUSY,
    WORKER_MEMORY,
    WORKER_STALLED,
    WORKER_TOKENS,
    Kind,
    Metric,
    declared,
)

RUN = "AMENABLE_RUN_TAG"
"""Environment variable of generators and scoring processes: the tag of the run that made them."""


log = logging.getLogger(__name__)

REFRESH_S = 4.0
"""Seconds after which gauges are set again. Ray exports a gauge once, at the end of the ten seconds in which it was
set, and the node's agent forgets it twenty seconds later."""


class Meter(Protocol):
    """Where measurements go: one call a measurement, with all labels."""

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """A gauge's value, what a counter grows by, or an observation."""
        ...

    def clear(self, metric: Metric, labels: dict[str, str]) -> None:
        """A gauge has no value any more."""
        ...


class RayMeter:
    """Ray's metrics of this process, as long as it is connected. Ray exports them every ten seconds."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, frozenset[tuple[str, str]]], tuple[Metric, float, dict[str, str]]] = {}
        """Gauges that last, by name and labels, with their values."""
        self._lock = threading.Lock()
        self._refreshes: threading.Thread | None = None

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Hands a measurement to Ray; does nothing in a process that is not connected."""
        if not ray.is_initialized():
            return
        labels = {name: as_ascii(text) for name, text in labels.items()}
        if metric.kind is Kind.GAUGE and metric.lasts:
            self._keep(metric, value, labels)
        self._hand_over(metric, value, labels)

    def clear(self, metric: Metric, labels: dict[str, str]) -> None:
        """Sets a gauge no longer: half a minute later it is gone."""
        labels = {name: as_ascii(text) for name, text in labels.items()}
        with self._lock:
            self._gauges.pop((metric.name, frozenset(labels.items())), None)

    def _hand_over(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        try:
            instrument = self._instrument(metric)
            match metric.kind:
                case Kind.COUNTER:
                    instrument.inc(value, labels)
                case Kind.GAUGE:
                    instrument.set(value, labels)
                case Kind.HISTOGRAM:
                    instrument.observe(value, labels)
        except Exception as error:  # noqa: BLE001 - Ray's, at its end for one: no run ends over what is only shown
            log.warning("%s could not be exported: %r", metric.name, error)

    def _keep(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        with self._lock:
            self._gauges[(metric.name, frozenset(labels.items()))] = metric, value, labels
            if self._refreshes is None:
                self._refreshes = threading.Thread(target=self._refresh, name="gauges", daemon=True)
                self._refreshes.start()

    def _refresh(self) -> None:
        while True:
            time.sleep(REFRESH_S)
            with self._lock:
                kept = list(self._gauges.values())
            for each in kept:
                if ray.is_initialized():
                    self._hand_over(*each)

    def _instrument(self, metric: Metric) -> Any:
        from ray.util import metrics

        with self._lock:
            if metric.name not in self._made:
                made = {
                    Kind.COUNTER: metrics.Counter,
                    Kind.GAUGE: metrics.Gauge,
                    Kind.HISTOGRAM: metrics.Histogram,
                }[metric.kind]
                buckets = {"boundaries": list(metric.buckets)} if metric.buckets else {}
                self._made[metric.name] = made(metric.name, metric.description, tag_keys=metric.labels, **buckets)
            return self._made[metric.name]


def as_ascii(text: str) -> str:
    """`text` as Ray takes it in a label: what is not ASCII is escaped. A run's directory may be called anything."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


@cache
def _ray_meter() -> RayMeter:
    """One for the process: Ray keeps instruments by name."""
    return RayMeter()


class Telemetry:
    """Exports for one role of a run, from any thread. Tags beside run, role and worker are given by keyword."""

    def __init__(self, run: str, role: str, worker: str = "", meter: Meter | None = None) -> None:
        """`worker` is empty where the numbers are of the whole role; `meter` is Ray's unless given."""
        self._common = {"run": run, "role": role, "worker": worker}
        self._meter = meter if meter is not None else _ray_meter()
        self._counted: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()

    def of(self, role: str, worker: str = "") -> "Telemetry":
        """Exports of the same run for another role, or another of its workers."""
        return Telemetry(self._common["run"], role, worker, self._meter)

    def set(self, metric: Metric, value: float, **tags: str) -> None:
        """A gauge is at `value`, until it is set or cleared or, where it does not last, for some seconds."""
        self._meter.record(metric, float(value), self._labels(metric, Kind.GAUGE, tags))

    def clear(self, metric: Metric, **tags: str) -> None:
        """A gauge has no value any more."""
        self._meter.clear(metric, self._labels(metric, Kind.GAUGE, tags))

    def add(self, metric: Metric, amount: float = 1.0, **tags: str) -> None:
        """A counter grows by `amount`; 0 is no growth."""
        if amount < 0:
            raise ValueError(f"{metric.name} is a counter and cannot fall by {-amount:g}")
        if amount > 0:  # Ray refuses 0
            self._meter.record(metric, float(amount), self._labels(metric, Kind.COUNTER, tags))

    def observe(self, metric: Metric, value: float, **tags: str) -> None:
        """One more value of a histogram."""
        self._meter.record(metric, float(value), self._labels(metric, Kind.HISTOGRAM, tags))

    def count_to(self, metric: Metric, total: float, **tags: str) -> None:
        """A counter that is kept elsewhere has come to `total`: grows by what is new since the last call, at first by
        all. A total that fell counts nothing until it is above its highest again."""
        key = (metric.name, frozenset(tags.items()))
        with self._lock:
            new = total - self._counted.get(key, 0.0)
            self._counted[key] = max(total, self._counted.get(key, 0.0))
        if new > 0:
            self.add(metric, new, **tags)

    def count_from(self, metric: Metric, total: float, **tags: str) -> None:
        """What `count_to` is given later was `total` before this process: it is not counted here."""
        with self._lock:
            self._counted[(metric.name, frozenset(tags.items()))] = total

    def at_work(self, busy_s: float, tokens: int, memory_bytes: int, stalled_s: float) -> None:
        """What a generator or a scoring process says of itself: seconds at work and tokens since it started, its
        memory, and for how long what it is at has not got on."""
        self.count_to(WORKER_BUSY, busy_s)
        self.count_to(WORKER_TOKENS, tokens)
        self.set(WORKER_MEMORY, memory_bytes)
        self.set(WORKER_STALLED, stalled_s)

    def _labels(self, metric: Metric, kind: Kind, tags: dict[str, str]) -> dict[str, str]:
        """All labels of a measurement. Raises ValueError for a metric that is not declared as it is used here."""
        if declared().get(metric.name) != metric:  # by value: Ray sends an actor's constants as copies
            raise ValueError(f"{metric.name} is not declared in actors/exported_metrics.py")
        if metric.kind is not kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")
        if set(tags) != set(metric.tags):
            raise ValueError(f"{metric.name} has the tags {metric.tags}, not {tuple(tags)}")
        return self._common | tags


def worker_telemetry(role: str, worker: str) -> Telemetry:
    """Exports of this process, which is one worker of the run that its environment names."""
    return Telemetry(os.environ.get(RUN, ""), role, worker)
