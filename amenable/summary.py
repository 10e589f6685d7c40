"""summary.json, and what `--json` prints of a run: what came of it. The models here document its keys."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class _Documented(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageSummary(_Documented):
    """One stage of the run."""

    reused: bool = Field(description="True where an earlier run had done it and nothing that it reads has changed.")
    seconds: float = Field(description="Wall-clock seconds that it took when it was done.")
    values: dict[str, Any] = Field(default={}, description="What the stage found: losses, counts, the choice made.")


class Summary(_Documented):
    """What came of a run.

    The keys from `learned` on are those of `evaluation.results.summary`, which says more of them; they are null where
    the run ended before its evaluation.
    """

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, description="Version of these keys.")
    run: str = Field(description="Name of the run.")
    run_directory: str = Field(description="Where the run is, as the recipe gives it.")
    synthetic: bool = Field(description="True where prompts, labels and gold scores come from the built-in world.")
    until: str | None = Field(default=None, description="The stage the run was asked to end after; null: the last.")
    stages: dict[str, StageSummary] = Field(default={}, description="'sft', 'round-01/ppo', … in their order.")
    seconds: dict[str, float] = Field(default={}, description="Seconds by stage, and of this command as 'command'.")
    report: str | None = Field(default=None, description="Path of the report inside the run directory; null: none.")
    learned: bool | None = Field(
        default=None,
        description="True where PPO beats SFT by the gold judge, raw and length-controlled, with intervals above 50 %; "
        "false where it does not; null where the reward model alone says that it does.",
    )
    verdict: str | None = Field(default=None, description="The same as a sentence with its figures.")
    judge: str | None = Field(default=None, description="Whose scores decide: 'gold' or 'reward'.")
    win_rates: dict[str, Any] | None = Field(default=None, description="'A_vs_B' → judge → raw, length_controlled.")
    models: dict[str, Any] | None = Field(default=None, description="Model → its means over held-out prompts.")
    reward_model: dict[str, Any] | None = Field(default=None, description="Accuracy of the reward model, baselines.")
    samples_per_prompt: int | None = Field(default=None, description="Answers of each model to each prompt.")
    prompts: int | None = Field(default=None, description="Held-out prompts of the evaluation.")
