"""What an audit reads of a PPO stage: its settings, attempts, episodes and checkpoints, as they lie there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.attempts import Attempt, SavedProgress, read_attempts, read_counts, read_trained
from actors.episodes import EPISODE, PromptOrder
from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import read_table
from evaluation.damaged_files import object_in, objects_by_line, read_text, yaml_mapping

_EPISODES = re.compile(r"update-(\d{6,})-attempt-(\d+)\.parquet")
_CHECKPOINT = re.compile(r"step-(\d{8,})-(\d+)")
_SCHEMA_VERSION = (EPISODE.metadata or {})[b"schema_version"]


@dataclass(frozen=True)
class Plan:
    """What the stage was to do: episodes an update, the staleness bound, the number of updates and their steps."""

    batch_size: int
    max_staleness: int
    updates: int
    seed: int
    minibatches: int
    inner_epochs: int
    critic_warmup_updates: int

    def steps(self, updates: int) -> dict[str, int]:
        """By network, the steps that its optimiser takes in `updates` updates: one a minibatch and pass. The policy
        takes none in the updates that warm up the critic, and no step is left out: one that is not finite ends a
        run."""
        an_update = self.minibatches * self.inner_epochs
        moved = updates - min(updates, self.critic_warmup_updates)
        return {"policy": moved * an_update, "value": updates * an_update}


@dataclass(frozen=True)
class EpisodeFile:
    """One file of episodes: what `attempt` took to train `update` with (from 1)."""

    path: Path
    update: int
    attempt: int


@dataclass(frozen=True)
class SavedStream:
    """What a complete checkpoint holds of the stream, and says of itself."""

    path: Path
    said: SavedProgress
    episodes: pa.Table


class Prompts:
    """Which prompt each slot owns, by the run's seeded order."""

    def __init__(self, path: Path, seed: int) -> None:
        """`path` is a prompts table. Raises UsageProblem where it is none."""
        table = read_table(path, "prompts")
        self._ids: list[str] = table["prompt_id"].to_pylist()
        self._tokens: list[list[int]] = table["prompt_tokens"].to_pylist()
        self._order = PromptOrder(len(self._ids), seed)

    def of(self, slot: int) -> tuple[str, list[int]]:
        """Id and tokens of the prompt of `slot`."""
        row = self._order[slot]
        return self._ids[row], self._tokens[row]


class StageFiles:
    """A PPO stage's directory, `RUN/round-NN/ppo`."""

    def __init__(self, directory: Path, with_weights: bool = True) -> None:
        """Without weights, checkpoints are taken for complete though theirs are not there: a copy of a run has none.

        Raises UsageProblem or RunProblem, which name the file, where one is not what it says.
        """
        self.directory = directory
        self._with_weights = with_weights
        run = directory.parents[1]
        self.record = object_in(directory / "stage.json")
        """What says that the stage is done; None while it is not."""
        started = object_in(directory / "stage.started.json")
        self.plan = _plan(directory, (self.record or started or {}).get("reads"), run / "recipe.yaml")
        self.round_number = int(directory.parent.name.rpartition("-")[2])
        self.attempts: list[Attempt] = read_attempts(directory)
        self.counts = read_counts(directory)
        self._prompts = run / "data" / "prompts-ppo.parquet"

    @property
    def finished(self) -> int | None:
        """The updates of a stage that is done; None for one that is not."""
        if self.record is None:
            return None
        values = self.record.get("values")
        updates = values.get("updates") if isinstance(values, dict) else None
        if not isinstance(updates, int):
            raise UsageProblem(
                f"{self.directory / 'stage.json'} does not say how many updates were trained.", "run/damaged"
            )
        return updates

    @cached_property
    def prompts(self) -> Prompts | None:
        """None where the table is not there any more."""
        return Prompts(self._prompts, self.plan.seed) if self._prompts.is_file() else None

    def episode_files(self) -> list[EpisodeFile]:
        """In the order of updates, then attempts."""
        found = []
        for path in (self.directory / "episodes").glob("*.parquet"):
            if match := _EPISODES.fullmatch(path.name):
                found.append(EpisodeFile(path, int(match[1]), int(match[2])))
        return sorted(found, key=lambda file: (file.update, file.attempt))

    def checkpoints(self) -> list[SavedStream]:
        """The complete ones, oldest first: those whose files have the sizes of their manifest, and the right hashes
        where they are read here."""
        found = []
        for path in (self.directory / "checkpoints").glob("step-*"):
            if match := _CHECKPOINT.fullmatch(path.name):
                found.append(((int(match[1]), int(match[2])), path))
        saved = (_saved_stream(path, step, self._with_weights) for (step, _), path in sorted(found))
        return [each for each in saved if each is not None]

    def trained(self) -> SavedProgress | None:
        """What the last checkpoint of a stage that is done said; None where that was not kept. Raises RunProblem where
        it cannot be read."""
        return read_trained(self.directory)

    def metric_steps(self) -> list[int] | None:
        """The update of each line of metrics.jsonl; None where there is no such file."""
        path = self.directory / "metrics.jsonl"
        return [int(line["step"]) for _, line in objects_by_line(path)] if path.is_file() else None

    def changed_since_committed(self) -> list[str]:
        """Files of episodes and attempts that are not as stage.json says; none while there is no stage.json."""
        recorded = (self.record or {}).get("files", {})
        return [
            name
            for name, written in recorded.items()
            if name.startswith(("episodes/", "attempts/")) and _sha256(self.directory / name) != written["sha256"]
        ]


def ppo_stages(run_directory: Path, with_weights: bool = True) -> list[StageFiles]:
    """The PPO stages of a run, by round. Raises RunProblem where it has none yet."""
    found = sorted(path for path in run_directory.glob("round-[0-9]*/ppo") if path.is_dir())
    if not found:
        raise RunProblem(f"{run_directory} has no PPO stage yet: there is nothing to audit.", "run/not-so-far")
    return [StageFiles(path, with_weights) for path in found]


def read_episodes(path: Path) -> pa.Table:
    """The episodes of a file. Raises UsageProblem where it holds something else, or cannot be read."""
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise UsageProblem(f"{path.name}: this is not a readable Parquet file ({said}).", "run/damaged") from error
    missing = [name for name in EPISODE.names if name not in table.column_names]
    if missing:
        raise UsageProblem(
            f"{path.name}: these are no episodes: there is no column {', '.join(missing)}.", "run/damaged"
        )
    version = (table.schema.metadata or {}).get(b"schema_version")
    if version != _SCHEMA_VERSION:
        raise UsageProblem(
            f"{path.name}: its episodes are of schema version {version!r}, not {_SCHEMA_VERSION!r}.",
            "run/schema-version",
        )
    return table


def _plan(directory: Path, reads: Any, recipe: Path) -> Plan:
    """From what the stage read, by its own record; else from the run's recipe."""
    found: Mapping[str, Any] = reads if isinstance(reads, dict) else yaml_mapping(recipe, read_text(recipe) or "")
    names = [each.name for each in fields(Plan)]
    try:
        return Plan(**{name: int((found if name == "seed" else found["ppo"])[name]) for name in names})
    except (KeyError, TypeError, ValueError):
        told = ", ".join(name if name == "seed" else f"ppo.{name}" for name in names)
        raise UsageProblem(
            f"{directory}: neither its stage record nor {recipe.name} says what it was to do ({told}).",
            "run/damaged",
        ) from None


def _saved_stream(path: Path, step: int, with_weights: bool) -> SavedStream | None:
    """None where the checkpoint is not complete, as for the learner: it is no checkpoint."""
    try:
        manifest = object_in(path / "manifest.json")
        if manifest is None:
            return None
        files = manifest["files"]
        for name, recorded in files.items():
            file = path / name
            if file.suffix == ".safetensors" and not with_weights:
                continue
            if file.stat().st_size != recorded["size_bytes"]:
                return None
            if name in ("data.json", "episodes.parquet") and _sha256(file) != recorded["sha256"]:
                return None
        data = object_in(path / "data.json")
        if data is None:
            return None
        episodes = read_episodes(path / "episodes.parquet")
        return SavedStream(path, SavedProgress.of(step, data, episodes["slot"].to_pylist()), episodes)
    except (UsageProblem, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None
