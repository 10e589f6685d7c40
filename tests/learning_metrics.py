"""What of a PPO update's metrics comes of what was learnt, and not of the clock, or of who did it in which attempt."""

from collections.abc import Mapping
from typing import Any

FAMILIES = (
    "episode",
    "lr",
    "objective/",
    "response/",
    "loss/",
    "policy/",
    "val/",
    "mismatch/max_abs_log_ratio",
    "mismatch/mean_abs_log_ratio",
    "staleness/version_lag",
    "staleness/effective_sample_size",
)


def learning(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of metrics.jsonl, what an undisturbed run and one that was stopped and resumed have in common."""
    found = {name: value for name, value in row.items() if name.startswith(FAMILIES)}
    assert len(found) >= 25, sorted(found)
    return found
