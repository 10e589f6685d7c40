"""What every stage is given: the recipe, the run's directory, progress, and the actors, which start when needed."""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amenable import interruption
from amenable.crew import Crew
from amenable.json_files import write_json
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RoundDirectory, RunDirectory
from amenable.stage_reuse import StageSpec, read_record, stage_hash
from amenable.stages.sources import PADDED_BASE, whereabouts
from corpus.problems import RunProblem


@dataclass(frozen=True)
class Finished:
    """What a stage leaves: files (or directories) it made, and the plain values that later stages and people read."""

    files: Sequence[Path]
    values: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads (`spec`) and what it does (`body`)."""

    name: str
    spec: StageSpec
    body: Callable[["Context", StageSpec], Finished]


@dataclass(frozen=True)
class Context:
    """A run under way."""

    recipe: Recipe
    run: RunDirectory
    progress: Progress
    crew: Crew
    check_lease: Callable[[], None] = lambda: None
    """To be called before anything is committed to the run's directory: raises RunProblem once another attempt has
    taken it over. Checks nothing where nothing is written."""

    def store(self) -> None:
        """Makes the object store that keeps the run as the working copy is; nothing for any other run."""
        if self.run.stored is not None:
            self.run.stored.push(self.check_lease)

    @property
    def round(self) -> RoundDirectory:
        """The round of fresh comparisons that is under way."""
        return self.run.round(1)

    def data(self, name: str) -> Path:
        """A table of the data stage by its name without ending, such as 'prompts-ppo'."""
        return self.run.data / f"{name}.parquet"

    @property
    def tokenizer(self) -> str:
        """The run's tokenizer directory."""
        return str(self.run.data / "tokenizer")

    def base_model(self) -> str:
        """The base model: the given one (with a row for PAD, where it had none), or the one of the base stage."""
        base = self.recipe.model.base
        if base is None:
            return str(self.run.base / "export")
        padded = self.run.data / PADDED_BASE
        return str(padded) if padded.is_dir() else whereabouts(base)

    def values(self, directory: Path) -> dict[str, Any]:
        """What the stage in `directory`, which is complete, found."""
        record = read_record(directory)
        assert record is not None, directory
        return record.values

    def max_sequence_tokens(self) -> int:
        """Context of the engines: the longest prompt and response together."""
        return self.recipe.tokens.max_prompt_tokens + self.recipe.sampling.max_response_tokens

    def learn(
        self, run: Callable[..., dict[str, Any]], job: Any, meanwhile: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        """Run a job on the learner group, showing its progress; `meanwhile` is called at every sign of it. Raises
        Interrupted where a stop was asked for."""
        from learners.worker import Interrupted, Progress

        def show(progress: Progress) -> None:
            values = {_SHOWN[name]: value for name, value in progress.values.items() if name in _SHOWN}
            self.progress.update(progress.done, progress.total, progress.unit, values)
            if SERVING in progress.values:
                self.crew.generators_serve(round(progress.values[SERVING]))
            meanwhile()

        try:
            return self.crew.ready_learners().run(run, job, show, interruption.requested)
        except Interrupted as stop:
            raise interruption.Interrupted(str(stop)) from stop

    def tracked(self) -> Any:
        """What a learner's job is told of the recipe's tracker (`learners.tracking.Tracked`); None where there is none.

        The run's id there is made once and kept in RUN/tracking.json, so that every attempt goes on with it.
        """
        from learners.tracking import Tracked

        settings = self.recipe.tracking.wandb
        return None if settings is None else Tracked(settings, self.recipe.name, self._tracking_id())

    def _tracking_id(self) -> str:
        path = self.run.root / TRACKING_FILE
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except FileNotFoundError:
            made = f"{self.recipe.name}-{secrets.token_hex(5)}"
            self.check_lease()
            write_json(path, {"schema_version": 1, "id": made})
            return made
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunProblem(
                f"{path} cannot be read ({error}); remove it to begin anew at the tracker.", "run/damaged"
            ) from None

    def identity(self, spec: StageSpec) -> str:
        """The hash of all that the stage reads."""
        return stage_hash(spec)


TRACKING_FILE = "tracking.json"
"""In the run's directory: what the run is called at a tracker."""

SERVING = "fleet/generators_serving"
"""PPO's metric of how many generators there are."""

_SHOWN = {
    "loss": "loss",
    "valid_loss": "valid loss",
    "accuracy": "accuracy",
    "lr": "lr",
    "tokens_per_s": "tokens/s",
    "objective/scores": "reward",
    "objective/kl": "KL",
    "response/length_mean": "tokens",
    "throughput/episodes_per_second": "episodes/s",
}
"""Metrics worth a person's eye while a stage runs, and what they are called there."""
