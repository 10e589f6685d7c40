"""What a report reads of a run directory: a picture of it in memory, with gaps where the run has none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from corpus.problems import UsageProblem
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
    first_stages: Mapping[str, Stage]
    rounds: list[Round]

    @property
    def stages(self) -> list[Stage]:
        """All stages in the order in which they run."""
        return [*self.first_stages.values(), *(stage for one in self.rounds for stage in one.stages.values())]


def read_run(run_directory: Path) -> RunFiles:
    """Reads what is there. Raises UsageProblem where there is no run directory, or a file in it is not what it says."""
    if not run_directory.is_dir():
        raise UsageProblem(f"{run_directory}: there is no such run directory to report on.")
    recipe_path = run_directory / "recipe.yaml"
    recipe_text = recipe_path.read_text(encoding="utf-8") if recipe_path.exists() else None
    lineage = _read_object(run_directory / "lineage.json")
    seconds = {name: stage.get("seconds") for name, stage in (lineage or {}).get("stages", {}).items()}
    rounds = [
        _read_round(run_directory, path.name, seconds)
        for path in sorted(run_directory.glob("round-[0-9]*"))
        if path.is_dir()
    ]
    return RunFiles(
        name=(lineage or {}).get("run") or run_directory.resolve().name,
        recipe_text=recipe_text,
        recipe=_read_recipe(recipe_path, recipe_text),
        lineage=lineage,
        first_stages={name: _read_stage(run_directory, name, seconds) for name in FIRST_STAGES},
        rounds=rounds,
    )


def _read_recipe(path: Path, text: str | None) -> Mapping[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        raise UsageProblem(f"{path}: this is not YAML ({error}).") from error
    return recipe if isinstance(recipe, dict) else {}


def _read_round(run_directory: Path, name: str, seconds: Mapping[str, float | None]) -> Round:
    directory = run_directory / name
    results = directory / "eval" / "results.json"
    selection = directory / "select-sft" / "selection.json"
    return Round(
        name=name,
        stages={stage: _read_stage(run_directory, f"{name}/{stage}", seconds) for stage in ROUND_STAGES},
        results=read_results(results) if results.exists() else None,
        evaluations=_read_evaluations(directory / "ppo" / "evaluations.jsonl"),
        lengths=_read_lengths(directory / "eval" / "samples.parquet"),
        selection=selection.read_text(encoding="utf-8") if selection.exists() else None,
    )


def _read_stage(run_directory: Path, name: str, seconds: Mapping[str, float | None]) -> Stage:
    directory = run_directory / name
    record = _read_object(directory / "stage.json")
    started = directory.is_dir() and any(directory.iterdir())
    return Stage(
        name=name,
        state="done" if record is not None else "unfinished" if started else "absent",
        seconds=(record or {}).get("seconds") or seconds.get(name),
        metrics=read_metrics(directory / "metrics.jsonl"),
    )


def read_metrics(path: Path) -> dict[str, Curve]:
    """Metric → its curve. Where a step was done again after a restart, the later line counts.

    Raises UsageProblem for a line that is not a JSON object with a step; only the last line may be cut short.
    """
    by_step: dict[str, dict[float, float]] = {}
    for number, line in _read_lines(path):
        step = line.get("step")
        if not isinstance(step, int | float):
            raise UsageProblem(f"{path}, line {number}: a metrics line needs a number called step.")
        for name, value in line.items():
            if name not in {"step", "time"} and isinstance(value, int | float):
                by_step.setdefault(name, {})[step] = float(value)
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in by_step.items()}


def _read_evaluations(path: Path) -> list[Evaluation]:
    by_update: dict[int, Evaluation] = {}
    for number, line in _read_lines(path):
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
        except (KeyError, TypeError, ValueError) as error:
            raise UsageProblem(f"{path}, line {number}: this is not an evaluation ({error}).") from error
        by_update[evaluation.update] = evaluation
    return [by_update[update] for update in sorted(by_update)]


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of lines, with their line numbers; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # no newline after it: the run was stopped while it wrote this line
            raise UsageProblem(f"{path}, line {number}: this is not JSON ({error.msg}).") from error
        if not isinstance(value, dict):
            raise UsageProblem(f"{path}, line {number}: this is not a JSON object.")
        found.append((number, value))
    return found


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageProblem(f"{path}: this is not JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise UsageProblem(f"{path}: this is not a JSON object.")
    return value


def _read_lengths(path: Path) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    table = pq.read_table(path)
    if not {"model", "length"} <= set(table.column_names):
        return {}
    lengths: dict[str, list[int]] = {}
    for model, length in zip(table["model"].to_pylist(), table["length"].to_pylist(), strict=True):
        lengths.setdefault(model, []).append(length)
    return lengths
