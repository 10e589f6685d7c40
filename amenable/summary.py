"""summary.json and what `--json` prints: what came of a run, in documented keys. The models below are the document."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Unit = Literal["share", "score", "nats", "tokens", "seconds", "episodes/s", "count", "loss"]


class _Documented(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(_Documented):
    """One figure that the run is judged by."""

    name: str = Field(description="What was measured, on what, against what: 'gold win rate of PPO against SFT'.")
    value: float | None = Field(description="The figure; null where it could not be measured.")
    low: float | None = Field(default=None, description="Lower end of the 95 % interval.")
    high: float | None = Field(default=None, description="Upper end of the 95 % interval.")
    unit: Unit = Field(default="score", description="'share' is a fraction from 0 to 1; the others say what they are.")
    note: str = Field(default="", description="What a reader must know to read the figure right; may be empty.")


class StageSummary(_Documented):
    """One stage of the run."""

    name: str = Field(description="The stage, with its round where it has one: 'sft', 'round-01/ppo'.")
    reused: bool = Field(description="True where an earlier run had done it and nothing that it reads has changed.")
    seconds: float = Field(description="Wall-clock seconds of the run that did it.")
    values: dict[str, Any] = Field(default={}, description="What the stage found: losses, counts, the choice made.")


class Summary(_Documented):
    """What came of a run."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="Version of these keys.")
    run: str = Field(description="Name of the run.")
    run_directory: str = Field(description="Where the run is, as the recipe gave it.")
    synthetic: bool = Field(description="True where prompts, feedback and gold scores come from the built-in world.")
    until: str | None = Field(default=None, description="The stage after which the run was asked to end.")
    seconds: float = Field(description="Wall-clock seconds of this command.")
    stages: list[StageSummary] = Field(default=[], description="The stages in their order.")
    results: list[Result] = Field(default=[], description="The figures the run is judged by, the most important first.")
    report: str | None = Field(default=None, description="Path of the report, from the run directory; null: none.")
