"""Whether what processes hold in memory grows while a run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

MIB = 1 << 20
FACTOR, SLACK_MIB = 1.10, 16.0
"""How much more than at first is no growth: what an allocator keeps differs from process to process by as much."""

YOUNG_S = 45.0
"""Seconds of a process's life that do not count: it still imports and loads."""


@dataclass(frozen=True)
class Sample:
    """What one process of a role held. `at` is in seconds since the soak began, `age` since the process did."""

    role: str
    at: float
    age: float
    bytes: int


@dataclass(frozen=True)
class Growth:
    """Of one role, in MiB: the median of the first and of the last third of the time, and the highest value."""

    role: str
    first: float
    last: float
    peak: float
    samples: int
    oldest_s: float = 0.0
    """The longest life of one of its processes: what grows more slowly than shows in it is not seen."""

    @property
    def bounded(self) -> bool:
        """Whether the last third holds no more than the first, within FACTOR and SLACK_MIB."""
        return self.last <= self.first * FACTOR + SLACK_MIB


def growth_of(samples: Sequence[Sample], duration_s: float) -> list[Growth]:
    """By role; one without a grown process in the first and in the last third is left out (see `not_judged`)."""
    found = []
    for role in sorted({each.role for each in samples}):
        grown = [each for each in samples if each.role == role and each.age >= YOUNG_S]
        first = [each.bytes / MIB for each in grown if each.at <= duration_s / 3]
        last = [each.bytes / MIB for each in grown if each.at >= duration_s * 2 / 3]
        if first and last:
            peak = max(each.bytes / MIB for each in grown)
            oldest = max(each.age for each in grown)
            found.append(Growth(role, median(first), median(last), peak, len(grown), oldest))
    return found


def not_judged(growth: Sequence[Growth], roles: Sequence[str]) -> list[str]:
    """Those of `roles` that had no grown process in the first or in the last third: nothing is known of them."""
    return [role for role in roles if role not in {each.role for each in growth}]


def too_young(growth: Sequence[Growth], duration_s: float) -> list[str]:
    """Roles none of whose processes lived through two thirds of the time, as each does where nobody is struck."""
    return [each.role for each in growth if each.oldest_s < duration_s * 2 / 3]
