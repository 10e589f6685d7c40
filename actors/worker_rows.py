"""What a PPO stage's conductor knows of each worker, in a file for people to watch: RUN/round-NN/ppo/workers.json.

JSON: `schema_version`, `time` (Unix seconds), `attempt` and `update` of the weights that were published last,
`publish_seconds`, and `workers`, one object each: `name`, `role`, `state`, `incarnation`, `attempt` and `update` of the
weights it holds (null where they are not the policy's, or none), and, between the last two publications, `busy_share`,
`cores`, `tokens_per_second`, with `peak_memory_bytes` so far. Rates are null until two reports have come in. Written
once a publication, whole or not at all.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.role_reports import RoleReport

SCHEMA_VERSION = 1
WORKERS_FILE = "workers.json"


@dataclass(frozen=True)
class WorkerRow:
    """One worker at a publication."""

    name: str
    role: str
    state: str
    incarnation: int
    attempt: int | None
    update: int | None
    busy_share: float | None = None
    cores: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None


def rates(before: RoleReport | None, now: RoleReport | None) -> dict[str, Any]:
    """The figures of one worker between two of its reports, by the names of `WorkerRow`; without a first, or from a
    process that took another's place, its memory alone."""
    if now is None:
        return {}
    found: dict[str, Any] = {"peak_memory_bytes": now.peak_bytes}
    if before is None or now.at_s <= before.at_s or now.cpu_s < before.cpu_s:
        return found
    seconds = now.at_s - before.at_s
    return found | {
        "busy_share": (now.busy_s - before.busy_s) / seconds,
        "cores": (now.cpu_s - before.cpu_s) / seconds,
        "tokens_per_second": (now.tokens - before.tokens) / seconds,
    }


def write_workers(
    directory: Path, attempt: int, update: int, publish_seconds: float, workers: Sequence[WorkerRow]
) -> None:
    """Says how the workers of the stage in `directory` are. Raises OSError."""
    says = {
        "schema_version": SCHEMA_VERSION,
        "time": time.time(),
        "attempt": attempt,
        "update": update,
        "publish_seconds": publish_seconds,
        "workers": [asdict(each) for each in workers],
    }
    partial = directory / f"{WORKERS_FILE}.partial"
    partial.write_text(json.dumps(says), encoding="utf-8")
    partial.replace(directory / WORKERS_FILE)


def read_workers(directory: Path) -> Mapping[str, Any] | None:
    """What was last said of the workers of the stage in `directory`; None where nothing was that can be understood."""
    try:
        says = json.loads((directory / WORKERS_FILE).read_text(encoding="utf-8"))
        if says["schema_version"] != SCHEMA_VERSION:
            return None
        [WorkerRow(**each) for each in says["workers"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return says
