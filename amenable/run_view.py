"""How a run is, as its files say: no connection to its cluster, and nothing of it is changed.

The stages' metrics.jsonl, PPO's workers.json and fleet.json, its attempts and evaluations, the lease, the audit log.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from actors.desired import read_desired, read_fleet
from actors.worker_rows import read_workers
from amenable.metrics_tail import MetricsTail
from amenable.stage_reuse import STAGE_FILE, STARTED_FILE
from corpus import audit_log

SCHEMA_VERSION = 1

STAGES = {
    "data": "data",
    "base": "base",
    "sft": "sft",
    "collect": "round-01/collect",
    "rm": "round-01/rm",
    "select-sft": "round-01/select-sft",
    "ppo-init": "round-01/ppo-init",
    "ppo": "round-01/ppo",
    "eval": "round-01/eval",
}
"""The stages in their order, and their directories."""

PPO_CURVES = {
    "reward": "objective/scores",
    "KL": "objective/kl",
    "length": "response/length_mean",
    "episodes/s": "throughput/episodes_per_second",
}
SUPERVISED_CURVES = {
    "loss": "loss",
    "validation": "valid/loss",
    "accuracy": "valid/accuracy",
    "tokens/s": "tokens_per_s",
}

UNITS = {"KL": "nats", "length": "tokens"}

_SETTINGS = {"base": "base", "sft": "sft", "rm": "rm", "ppo-init": "ppo_init"}
"""The recipe's part that says a supervised stage's epochs."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps of a stage."""

    name: str
    unit: str
    values: list[float]


@dataclass(frozen=True)
class Role:
    """A line of the table of roles. What is not known is None."""

    name: str
    state: str
    version: str | None = None
    tokens_per_second: float | None = None
    busy_share: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class RunView:
    """How a run is. Times are Unix seconds or seconds."""

    run: str
    place: str
    state: str
    """running; done (all its stages are); stopped (nobody works on it); or submitted."""
    holder: str
    """Who works on it, or worked last, as HOST, process PID; empty where nobody has yet."""
    written_at: float | None
    """When it last wrote something that is looked at here."""
    age_s: float | None
    stage: str
    stage_state: str
    """under way, done, or interrupted: begun, and nobody works on it."""
    figures_of: str
    """The stage that the figures below are of: this one, or the last one before it that has written some."""
    stages_done: int
    stages: int
    attempt: int | None
    done: float
    total: float | None
    unit: str
    seconds_a_step: float | None
    seconds_left: float | None
    roles: list[Role] = field(default_factory=list)
    stream: dict[str, float] = field(default_factory=dict)
    staleness: dict[str, float] = field(default_factory=dict)
    publication: dict[str, float] = field(default_factory=dict)
    fleet: dict[str, float] = field(default_factory=dict)
    wanted_generators: int | None = None
    waiting: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    served: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    """What came of the run, where it has been evaluated."""
    problem: str = ""
    """The last one, with its time; empty where there was none."""
    unreadable_lines: int = 0

    def as_json(self) -> dict[str, Any]:
        """What `amenable top --json` tells."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


@dataclass(frozen=True)
class Writer:
    """Who has the run's lease, or had it last: as its file, or an object store's claim, says."""

    holder: str
    is_alive: bool
    seen_at: float | None


NOBODY = Writer("", False, None)


class Watch:
    """Looks at the files of one run in `root`, which may be a copy of them, again and again."""

    def __init__(self, root: Path, place: str) -> None:
        """`place` is where people are told that the run is, and where its audit log is."""
        self._root, self._place = root, place
        self._tails: dict[str, MetricsTail] = {}

    def look(self, writer: Writer, now: float | None = None) -> RunView:
        """How the run is at this moment."""
        now = time.time() if now is None else now
        recipe = _yaml(self._root / "recipe.yaml")
        stages = [name for name in STAGES if not _is_left_out(name, recipe)]
        done = [name for name in stages if (self._root / STAGES[name] / STAGE_FILE).is_file()]
        begun = [name for name in stages if (self._root / STAGES[name] / STARTED_FILE).is_file() and name not in done]
        stage = (begun or done or [""])[-1]
        entries = audit_log.read(self._place)[0]
        upto = stages[: stages.index(stage) + 1] if stage else []
        figures_of = next((each for each in reversed(upto) if self._has_figures(each)), stage)
        directory = self._root / STAGES.get(figures_of, "nowhere")
        tail = self._tail(figures_of, directory)
        shown = self._shown(figures_of, tail, directory, recipe, now, writer.is_alive)
        said = [tail.newest.get("time"), *(each.get("time") for each in (_workers_of(directory), _fleet_of(directory)))]
        said += [_finished_at(self._root / STAGES[each]) for each in done]
        said += [datetime.fromisoformat(entry.time).timestamp() for entry in entries]
        written_at = max((float(at) for at in said if isinstance(at, int | float)), default=None)
        state = "running" if writer.is_alive else "done" if stages and len(done) == len(stages) else "stopped"
        if not writer.holder and not done and not begun:
            state = "submitted" if entries else "stopped"
        says = "done" if stage in done else "under way" if writer.is_alive else "interrupted"
        return RunView(
            run=str(recipe.get("name") or Path(self._place.partition("?")[0]).name),
            place=self._place.partition("?")[0],
            state=state,
            holder=writer.holder,
            written_at=written_at,
            age_s=None if written_at is None else max(now - written_at, 0.0),
            stage=stage,
            stage_state=says if stage else "",
            figures_of=figures_of,
            stages_done=len(done),
            stages=len(stages),
            verdict=str(_json(self._root / "summary.json").get("verdict") or ""),
            problem=_last_problem(entries, _fleet_of(directory), self._root),
            unreadable_lines=tail.unreadable,
            served=_served(self._root),
            **shown,
        )

    def _has_figures(self, stage: str) -> bool:
        return (self._root / STAGES[stage] / "metrics.jsonl").is_file()

    def _tail(self, stage: str, directory: Path) -> MetricsTail:
        if stage not in self._tails:
            names = PPO_CURVES.values() if stage == "ppo" else SUPERVISED_CURVES.values()
            self._tails = {
                stage: MetricsTail(directory / "metrics.jsonl", names)
            }  # those before are not shown any more
        self._tails[stage].look()
        return self._tails[stage]

    def _shown(
        self, stage: str, tail: MetricsTail, directory: Path, recipe: Mapping[str, Any], now: float, is_alive: bool
    ) -> dict[str, Any]:
        newest, seconds = tail.newest, _seconds_a_step(tail)
        done, total, unit = _progress(stage, newest, recipe)
        left = None
        if seconds is not None and total is not None and unit == "updates" and is_alive:
            left = max((total - done) * seconds - (now - newest["time"]), 0.0)
        found: dict[str, Any] = {
            "attempt": None,
            "done": done,
            "total": total,
            "unit": unit,
            "seconds_a_step": seconds,
            "seconds_left": left,
        }
        if stage != "ppo":
            curves = [Curve(name, UNITS.get(name, ""), tail.curves[of]) for name, of in SUPERVISED_CURVES.items()]
            roles = [_learners(newest, stage, directory, recipe)] if newest else []
            return found | {"curves": [each for each in curves if each.values], "roles": roles}
        curves = [Curve(name, UNITS.get(name, ""), tail.curves[of]) for name, of in PPO_CURVES.items()]
        held_out = _json_lines(directory / "evaluations.jsonl")
        gold = [float(each["gold"]) for each in held_out if isinstance(each.get("gold"), int | float)]
        if gold:
            curves.insert(1, Curve("held-out gold", "", gold))
        workers, fleet, wish = _workers_of(directory), _fleet_of(directory), _wanted(directory)
        attempts = sorted((directory / "attempts").glob("attempt-*.json"))
        return found | {
            "attempt": int(attempts[-1].stem.partition("-")[2]) if attempts else None,
            "curves": [each for each in curves if each.values],
            "roles": [
                _conductor(workers, newest),
                *_workers(workers, fleet),
                _learners(newest, stage, directory, recipe),
            ],
            "stream": _numbers(newest, "stream/", ("admitted", "leased", "generated", "accepted_waiting", "trained")),
            "staleness": _numbers(
                newest, "staleness/", ("version_lag_mean", "version_lag_max", "straggler_age_seconds")
            ),
            "publication": _numbers(newest, "sync/", ("publish_seconds", "pause_seconds")),
            "fleet": _numbers(newest, "fleet/", ("generators_serving", "suspect", "dead", "restarting", "restarts")),
            "wanted_generators": wish,
            "waiting": [str(each) for each in fleet.get("waiting") or ()],
        }


# parts -----------------------------------------------------------------------------------------------------------


def _is_left_out(stage: str, recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe has no such stage (see `pipeline.stages_of`)."""
    if stage == "base":
        return bool((recipe.get("model") or {}).get("base"))
    return stage == "collect" and recipe.get("corpus") is not None


def _progress(stage: str, newest: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[float, float | None, str]:
    """(done, of how many, of what) in a stage."""
    if stage == "ppo":
        return float(newest.get("step", 0)), (recipe.get("ppo") or {}).get("updates"), "updates"
    settings = recipe.get(_SETTINGS.get(stage, "")) or {}
    if settings.get("steps") is not None:
        return float(newest.get("step", 0)), settings["steps"], "steps"
    return float(newest.get("epoch", 0.0)), settings.get("epochs"), "epochs"


def _seconds_a_step(tail: MetricsTail) -> float | None:
    """Over the lines that are kept; None before the second."""
    if len(tail.recent) < 2:
        return None
    first, last = tail.recent[0], tail.recent[-1]
    steps = last["step"] - first["step"]
    return (last["time"] - first["time"]) / steps if steps > 0 else None


def _conductor(workers: Mapping[str, Any], newest: Mapping[str, Any]) -> Role:
    if not workers:
        return Role("conductor", "published" if newest else "has not published yet")
    return Role("conductor", "published", f"{workers['attempt']}.{workers['update']}")


def _workers(workers: Mapping[str, Any], fleet: Mapping[str, Any]) -> list[Role]:
    """Generators and scoring processes: figures of the last publication, states as they were said last."""
    states: dict[str, Any] = dict(fleet.get("workers") or {})
    known = {each["name"]: each for each in workers.get("workers") or ()}
    roles = []
    for name in dict.fromkeys([*known, *states]):
        row = known.get(name, {})
        version = None if row.get("update") is None else f"{row['attempt']}.{row['update']}"
        called = name if row.get("role") in (None, "generator") else f"{name} ({row['role']})"
        roles.append(
            Role(
                called,
                str(states.get(name, row.get("state") if not states else "gone")),
                version,
                row.get("tokens_per_second"),
                row.get("busy_share"),
                row.get("peak_memory_bytes"),
            )
        )
    return roles


def _learners(newest: Mapping[str, Any], stage: str, directory: Path, recipe: Mapping[str, Any]) -> Role:
    ranks = (recipe.get("learners") or {}).get("workers", 1)
    name = "learner" if ranks == 1 else f"learners (× {ranks})"
    if not newest:
        return Role(name, "no step yet")
    if stage != "ppo":
        return Role(name, "trained", None, newest.get("tokens_per_s"), None, _whole(newest.get("peak_memory_bytes")))
    waited, took = newest.get("time/wait_for_episodes"), newest.get("time/update")
    busy = 1.0 - waited / took if waited is not None and took else None
    return Role(
        name,
        "trained",
        f"{_whole(newest.get('stream/attempt')) or 0}.{newest['step']}",
        newest.get("throughput/tokens_per_second"),
        busy,
        _whole(newest.get("memory/learner_bytes")),
    )


def _numbers(row: Mapping[str, Any], prefix: str, names: tuple[str, ...]) -> dict[str, float]:
    found = {name: row.get(prefix + name) for name in names}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _last_problem(entries: list[audit_log.Entry], fleet: Mapping[str, Any], root: Path) -> str:
    """The newest of: a worker that was lost, a wish that cannot be read, what an attempt ended with, a failure for
    good."""
    found: list[tuple[float, str]] = []
    for entry in entries:
        if entry.action == audit_log.ENDED and entry.outcome.startswith(("failed", "refused")):
            found.append((datetime.fromisoformat(entry.time).timestamp(), entry.outcome.partition(": ")[2]))
    lost = fleet.get("lost")
    if isinstance(lost, list) and len(lost) == 2:
        found.append((float(lost[0]), str(lost[1])))
    if fleet.get("problem"):
        found.append((float(fleet.get("time") or 0.0), str(fleet["problem"])))
    failure = _json(root / "failure.json")
    if failure.get("problem"):
        found.append((_moment(failure.get("when")) or 0.0, str(failure["problem"])))
    if not found:
        return ""
    at, says = max(found)
    return f"{datetime.fromtimestamp(at).astimezone().isoformat(sep=' ', timespec='seconds')}: {says}"


def _served(root: Path) -> dict[str, Any]:
    """What a service of the run serves, where one has spoken lately."""
    if not (root / "serving" / "replicas").is_dir():
        return {}
    from serving.desired import read_reports, read_wish  # loads torch, by way of what is published

    replicas = read_reports(root)
    if not replicas:
        return {}
    held = sorted({str(slot.get("version")) for each in replicas.values() for slot in each["slots"] if slot["model"]})
    return {"replicas": len(replicas), "versions": held, "pinned": read_wish(root).pinned}


def _wanted(directory: Path) -> int | None:
    wish = read_desired(directory) if directory.is_dir() else None
    return None if wish is None else wish.generators


def _finished_at(directory: Path) -> float | None:
    """When the stage in `directory` was done, as its record says."""
    return _moment(_json(directory / STAGE_FILE).get("finished"))


def _moment(text: Any) -> float | None:
    """The Unix seconds of an ISO time; None for what is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _workers_of(directory: Path) -> Mapping[str, Any]:
    return read_workers(directory) or {}


def _fleet_of(directory: Path) -> dict[str, Any]:
    found = read_fleet(directory)
    return dict(found) if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that somebody appends to."""
    try:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    except OSError:
        return []
    found = []
    for line in whole:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [each for each in found if isinstance(each, dict)]
