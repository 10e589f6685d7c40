"""The contents of `eval/results.json`: what an evaluation found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corpus.problems import UsageProblem
from corpus.storage import write_atomically
from evaluation.win_rate import WinRate

SCHEMA_VERSION = 1

Judge = Literal["gold", "reward"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Accuracy(_Model):
    """The share of pairs that are put in the labelers' order, with its 95 % interval; all in [0, 1]."""

    rate: float = Field(ge=0, le=1, description="Share of pairs in the right order.")
    low: float = Field(ge=0, le=1, description="Lower end of the 95 % interval.")
    high: float = Field(ge=0, le=1, description="Upper end of the 95 % interval.")
    pairs: int = Field(ge=0, description="Number of pairs; ties are not counted.")


class ModelResult(_Model):
    """Means over the answers of one model."""

    gold: float | None = Field(description="Mean gold score; null without a gold judge.")
    reward: float = Field(description="Mean score of the reward model.")
    length: float = Field(ge=0, description="Mean length of a response, in tokens.")
    kl: float | None = Field(description="Mean KL to the reference, nats a sequence; null where not measured.")
    eos_rate: float = Field(ge=0, le=1, description="Share of responses that ended by themselves.")
    pretraining_loss: float | None = Field(
        default=None, description="Loss on held-out pretraining text, nats a token; null where not measured."
    )
    components: dict[str, float] = Field(
        default_factory=dict, description="Mean of each part of the gold score (task, truth, toxicity, …)."
    )


class Comparison(_Model):
    """One model against another by one judge."""

    model: str = Field(description="The model whose wins are counted.")
    against: str = Field(description="The model it is compared with.")
    judge: Judge = Field(description="Whose scores decide: the gold function or the reward model.")
    raw: WinRate = Field(description="Win rate as it is.")
    length_controlled: WinRate = Field(description="Win rate if both answers were equally long.")


class Answer(_Model):
    """One model's answer to a prompt kept for reading."""

    text: str = Field(description="The response.")
    reward: float = Field(description="Score of the reward model.")
    gold: float | None = Field(description="Gold score; null without a gold judge.")
    length: int = Field(ge=0, description="Length in tokens.")


class SideBySide(_Model):
    """One prompt with the answer of every model to it."""

    prompt: str = Field(description="The prompt.")
    answers: dict[str, Answer] = Field(description="Model name → its first sample.")


class RewardModelResult(_Model):
    """How well the reward model orders held-out comparisons."""

    accuracy: Accuracy = Field(description="On held-out prompts, by the labelers it was trained on.")
    heldout_labelers: Accuracy | None = Field(default=None, description="By labelers it never saw.")
    gold_accuracy: Accuracy | None = Field(default=None, description="Against the order of the gold scores.")
    baselines: dict[str, Accuracy] = Field(
        default_factory=dict, description="The same held-out pairs by simpler means (longer reply wins, …)."
    )
    baselines_left_out: dict[str, str] = Field(
        default_factory=dict, description="Baselines that could not be fitted or measured, each with its reason."
    )


class Results(_Model):
    """All that an evaluation found."""

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, description="Version of this format.")
    synthetic: bool = Field(description="Whether prompts, labels and gold scores come from a program, not from people.")
    samples_per_prompt: int = Field(ge=1, description="Answers that each model gave to each prompt.")
    prompts: int = Field(ge=1, description="Held-out prompts.")
    models: dict[str, ModelResult] = Field(description="Model name → its means.")
    comparisons: list[Comparison] = Field(description="Win rates.")
    side_by_side: list[SideBySide] = Field(description="The same fixed prompts answered by every model.")
    reward_model: RewardModelResult | None = Field(default=None, description="Accuracy of the reward model.")

    def comparison(self, model: str, against: str, judge: Judge) -> Comparison | None:
        """The comparison of `model` with `against` by `judge`; None where it was not made."""
        for found in self.comparisons:
            if (found.model, found.against, found.judge) == (model, against, judge):
                return found
        return None


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes `results` as JSON, whole or not at all."""

    def write(stream: IO[bytes]) -> None:
        stream.write(results.model_dump_json(indent=1).encode())

    write_atomically(path, write)


def read_results(path: str | os.PathLike[str]) -> Results:
    """The results in the JSON file `path`. Raises UsageProblem where it is missing or not one of this version."""
    try:
        return Results.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UsageProblem(
            f"{path}: there is no such file; evaluation results were expected.", "run/damaged"
        ) from error
    except OSError as error:
        raise UsageProblem(f"{path}: cannot be read ({error.strerror or error}).", "run/damaged") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UsageProblem(
            f"{path}: these are not evaluation results of version {SCHEMA_VERSION} ({where}: {first['msg']}).",
            "run/damaged",
        ) from error
