"""A meter that remembers what it was given."""

from actors.exported_metrics import Kind, Metric


class RecordingMeter:
    """What gauges are at and counters have come to, and all that histograms observed, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.history: list[tuple[str, float]] = []
        self.observed: dict[str, list[float]] = {}

    def record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        key = (metric.name, frozenset(labels.items()))
        self.history.append((metric.name, value))
        if metric.kind is Kind.HISTOGRAM:
            self.observed.setdefault(metric.name, []).append(value)
        else:
            before = self.values.get(key, 0.0) if metric.kind is Kind.COUNTER else 0.0
            self.values[key] = before + value

    def clear(self, metric: Metric, labels: dict[str, str]) -> None:
        self.values.pop((metric.name, frozenset(labels.items())), None)

    def of(self, metric: Metric, **labels: str) -> float | None:
        """The sum of the metric's values whose labels hold these; None where there are none."""
        found = [
            value
            for (name, tags), value in self.values.items()
            if name == metric.name and labels.items() <= dict(tags).items()
        ]
        return sum(found) if found else None
