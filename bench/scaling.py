"""What a control plane that was measured with ever more generators comes to: latencies, where throughput stops being
linear, and what was full by then. Pure arithmetic."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.10
"""Throughput is linear where it is within this share of so many generators' own."""

FULL = 0.9
"""Of a core, for a process that works on one at a time, or of all cores: what is busier than that is called full."""


@dataclass(frozen=True)
class Latency:
    """Of so many calls: the median and the 99th percentile, in seconds."""

    calls: int
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Level:
    """One number of generators, measured for `seconds`.

    `cores` are CPU seconds a second by role, all processes of a role together; `machine_cores` those of the whole
    machine, whoever used them. `publish_s` are of all publications of the stage. `waiting` is the share of the
    generators' time in which they had nothing to generate, and `late` by which share of the drawn time generating took
    longer: the simulation's own lag. `load` is the machine's load average before.
    """

    generators: int
    seconds: float
    episodes: int
    episodes_per_s: float
    lease: Latency
    accept: Latency
    publish_s: list[float]
    cores: dict[str, float]
    machine_cores: float
    waiting: float
    late: float
    load: float

    def of_linear(self, rate: float) -> float:
        """Throughput as a share of what so many generators make by themselves, `rate` episodes/s each."""
        return self.episodes_per_s / (self.generators * rate)


@dataclass(frozen=True)
class Linearity:
    """The most generators up to which every number was linear (None: not even the first), and the first number that
    was not (None: all were)."""

    until: int | None
    ends_at: int | None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed. Raises ValueError where there are none."""
    if not values:
        raise ValueError("there is no percentile of no values")
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def latency_of(seconds: Sequence[float]) -> Latency:
    """Raises ValueError where there was no call."""
    return Latency(len(seconds), percentile(seconds, 0.5), percentile(seconds, 0.99))


def linearity(episodes_per_s: Mapping[int, float], rate: float, tolerance: float = TOLERANCE) -> Linearity:
    """By number of generators, each of which makes `rate` episodes/s by itself. More than linear is linear; what comes
    after the first number that is not does not count, whatever it was."""
    until = None
    for generators in sorted(episodes_per_s):
        if episodes_per_s[generators] < (1 - tolerance) * generators * rate:
            return Linearity(until, generators)
        until = generators
    return Linearity(until, None)


def full(level: Level, cores: int) -> list[str]:
    """What was full while `level` was measured, each as a clause; `cores` are the machine's. A role of several
    processes is left out: it works on several cores."""
    found = [
        f"the {role}'s process used {level.cores[role]:.2f} of a core"
        for role in ("stream", "conductor", "store", "scoring")
        if level.cores.get(role, 0.0) >= FULL
    ]
    if level.machine_cores >= FULL * cores:
        own = sum(level.cores.values())
        found.append(
            f"the machine used {level.machine_cores:.2f} of its {cores} cores, the simulation {own:.2f} of them"
        )
    return found


def verdict(levels: Sequence[Level], rate: float, cores: int) -> str:
    """Where throughput stops being linear, and what was full there, as sentences."""
    found = linearity({level.generators: level.episodes_per_s for level in levels}, rate)
    within = f"Linear within {TOLERANCE:.0%}"
    if found.ends_at is None:
        return f"{within} up to {found.until} generators, the most that were measured."
    level = next(each for each in levels if each.generators == found.ends_at)
    start = f"{within} up to {found.until} generators" if found.until is not None else "Not linear from the first on"
    clauses = full(level, cores)
    why = f"There {' and '.join(clauses)}." if clauses else "Nothing was full there."
    return (
        f"{start}; {found.ends_at} made {level.of_linear(rate):.2f} of linear, and waited for work "
        f"{level.waiting:.0%} of their time. {why}"
    )


def table(levels: Sequence[Level], rate: float) -> list[str]:
    """What is printed, a line a level. Latencies in ms; publication: median and longest, in seconds."""
    heads = ("episodes", "of", "lease, ms", "accept, ms", "publish, s", "cores used by", "", "", "waits", "late")
    names = ("/s", "linear", "p50    p99", "p50    p99", "p50   most", "stream", "cond.", "all", "", "")
    widths = (9, 7, 15, 15, 14, 14, 7, 6, 7, 6)
    lines = [
        f"{left:>10}" + "".join(f"{name:>{width}}" for name, width in zip(row, widths, strict=True))
        for left, row in (("", heads), ("generators", names))
    ]
    for level in levels:
        cells = (
            f"{level.episodes_per_s:.1f}",
            f"{level.of_linear(rate):.2f}",
            _pair(level.lease),
            _pair(level.accept),
            _spread(level.publish_s),
            f"{level.cores['stream']:.2f}",
            f"{level.cores['conductor']:.2f}",
            f"{level.machine_cores:.2f}",
            f"{level.waiting:.0%}",
            f"{level.late:.0%}",
        )
        cut = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{level.generators:>10}{cut}")
    return lines


def _pair(latency: Latency) -> str:
    return f"{latency.p50_s * 1e3:.1f} {latency.p99_s * 1e3:>6.1f}"


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} {max(seconds):>6.3f}"
