"""What a report reads of a run directory: a picture of it in memory, with gaps where the run has none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.problems import UsageProblem
from evaluation.damaged_files import (
    finite,
    object_in,
    objects_by_line,
    read_lengths,
    read_text,
    yaml_mapping,
)
from evaluation.schema import Results, read_results

Curve = tuple[list[float], list[float]]
"""Steps and values of one metric, in the order of the steps."""

FIRST_STAGES = ("base", "sft")
ROUND_STAGES = ("collect", "rm", "select-sft", "ppo-init", "ppo", "eval")


@dataclass(frozen=True)
class Stage:
    """One stage's directory."""

    name: str
    """Its path in the run directory: `sft`, `round-01/ppo`."""

    state: str
    """"done" (stage.json is there), "unfinished" (other files are), or "absent"."""

    seconds: float | None
    metrics: Mapping[str, Curve]


@dataclass(frozen=True)
class Evaluation:
    """One line of `ppo/evaluations.jsonl`: held-out prompts answered by the EMA policy during PPO."""

    update: int
    episodes: int
    kl: float
    reward: float
    gold: float | None
    length: float
    eos_rate: float


@dataclass(frozen=True)
class Round:
    """One round: comparisons, reward model, PPO, evaluation."""

    name: str
    stages: Mapping[str, Stage]
    results: Results | None
    evaluations: list[Evaluation]
    lengths: Mapping[str, list[int]]
    """Model → lengths of its evaluation answers, tokens; empty where `eval/samples.parquet` is not there."""

    selection: str | None
    """The text of `select-sft/selection.json`."""


@dataclass(frozen=True)
class RunFiles:
    """A run directory as a report sees it."""

    name: str
    recipe_text: str | None
    recipe: Mapping[str, Any]
    lineage: Mapping[str, Any] | None
    rows: Mapping[str, int]
    """Of the data stage: table → its rows; `TABLE-long-prompts` and so on → how many were left out, cut or split."""

    first_stages: Mapping[str, Stage]
    rounds: list[Round]

    @property
    def stages(self) -> list[Stage]:
        """All stages in the order in which they run."""
        return [*self.first_stages.values(), *(stage for one in self.rounds for stage in one.stages.values())]


def read_run(run_directory: Path) -> RunFiles:
    """Reads what is there. Raises UsageProblem where there is no run directory, or a file in it is not what it says."""
    if not run_directory.is_dir():
        raise UsageProblem(f"{run_directory}: there is no such run directory to report on.", "run/not-found")
    try:
        return _read_run(run_directory)
    except OSError as error:  # a directory that may not be listed
        place = error.filename or run_directory
        raise UsageProblem(f"{place}: cannot be read ({error.strerror or error}).", "run/damaged") from error


def _read_run(run_directory: Path) -> RunFiles:
    recipe_text = read_text(run_directory / "recipe.yaml")
    lineage = _read_lineage(run_directory / "lineage.json")
    stages = (lineage or {}).get("stages", {})
    seconds = {name: stage.get("seconds") for name, stage in stages.items()}
    rounds = [
        _read_round(run_directory, path.name, seconds)
        for path in sorted(run_directory.glob("round-[0-9]*"))
        if path.is_dir()
    ]
    return RunFiles(
        name=str((lineage or {}).get("run") or run_directory.resolve().name),
        recipe_text=recipe_text,
        recipe=yaml_mapping(run_directory / "recipe.yaml", recipe_text or ""),
        lineage=lineage,
        rows=_read_rows(run_directory / "data" / "stage.json"),
        first_stages={name: _read_stage(run_directory, name, seconds) for name in FIRST_STAGES},
        rounds=rounds,
    )


def _read_lineage(path: Path) -> Mapping[str, Any] | None:
    lineage = object_in(path)
    if lineage is None:
        return None
    stages = lineage.get("stages", {})
    if not isinstance(stages, dict):
        raise UsageProblem(f"{path}: stages should be an object, one entry a stage.", "run/damaged")
    for name, stage in stages.items():
        if not isinstance(stage, dict) or not isinstance(stage.get("parents", {}), dict):
            raise UsageProblem(
                f"{path}: the stage {name} should be an object whose parents are one, too.", "run/damaged"
            )
        _seconds(stage, f"{path}: the stage {name}")
    return lineage


def _read_rows(path: Path) -> Mapping[str, int]:
    values = (object_in(path) or {}).get("values", {})
    if not isinstance(values, dict):
        raise UsageProblem(f"{path}: values should be an object.", "run/damaged")
    return {name: value for name, value in values.items() if isinstance(value, int) and value >= 0}


def _seconds(record: Mapping[str, Any], where: str) -> float | None:
    value = record.get("seconds")
    if value is None:
        return None
    seconds = finite(value)
    if seconds is None or seconds < 0:
        raise UsageProblem(f"{where} should have a number of seconds, not {str(value)[:40]!r}.", "run/damaged")
    return seconds


def _read_round(run_directory: Path, name: str, seconds: Mapping[str, float | None]) -> Round:
    directory = run_directory / name
    results = directory / "eval" / "results.json"
    selection = directory / "select-sft" / "selection.json"
    return Round(
        name=name,
        stages={stage: _read_stage(run_directory, f"{name}/{stage}", seconds) for stage in ROUND_STAGES},
        results=read_results(results) if results.exists() else None,
        evaluations=_read_evaluations(directory / "ppo" / "evaluations.jsonl"),
        lengths=read_lengths(directory / "eval" / "samples.parquet"),
        selection=read_text(selection),
    )


def _read_stage(run_directory: Path, name: str, seconds: Mapping[str, float | None]) -> Stage:
    directory = run_directory / name
    record = object_in(directory / "stage.json")
    started = directory.is_dir() and any(directory.iterdir())
    return Stage(
        name=name,
        state="done" if record is not None else "unfinished" if started else "absent",
        seconds=_seconds(record or {}, str(directory / "stage.json")) or seconds.get(name),
        metrics=read_metrics(directory / "metrics.jsonl"),
    )


def read_metrics(path: Path) -> dict[str, Curve]:
    """Metric → its curve. Where a step was done again after a restart, the later line counts.

    Raises UsageProblem for a line that is not a JSON object with a step; only the last line may be cut short.
    """
    by_step: dict[str, dict[float, float]] = {}
    for number, line in objects_by_line(path):
        step = finite(line.get("step"))
        if step is None:
            raise UsageProblem(f"{path}, line {number}: a metrics line needs a number called step.", "run/damaged")
        for name, value in line.items():
            if name not in {"step", "time"} and isinstance(value, int | float):
                try:
                    by_step.setdefault(name, {})[step] = float(value)
                except OverflowError as error:
                    raise UsageProblem(
                        f"{path}, line {number}: {name} is too large a number.", "run/damaged"
                    ) from error
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in by_step.items()}


def _read_evaluations(path: Path) -> list[Evaluation]:
    by_update: dict[int, Evaluation] = {}
    for number, line in objects_by_line(path):
        try:
            gold = line.get("gold")
            evaluation = Evaluation(
                update=int(line["update"]),
                episodes=int(line["episodes"]),
                kl=float(line["kl"]),
                reward=float(line["reward"]),
                gold=None if gold is None or not math.isfinite(gold) else float(gold),
                length=float(line["length"]),
                eos_rate=float(line["eos_rate"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageProblem(f"{path}, line {number}: this is not an evaluation ({error}).", "run/damaged") from error
        by_update[evaluation.update] = evaluation
    return [by_update[update] for update in sorted(by_update)]
