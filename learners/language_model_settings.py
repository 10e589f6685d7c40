"""What a recipe says about one stage of language-model training. Kept apart from it, so that reading a recipe imports
no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learners.optimizer import OptimizerSettings

SftEpoch = Literal["best_validation", "last"]
"""An epoch of SFT: the one with the lowest validation loss, or the last."""


class LanguageModelSettings(BaseModel):
    """One stage of language-model training. Defaults are InstructGPT's SFT (section 3.5 and appendix C.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    optimizer: OptimizerSettings = Field(
        default=OptimizerSettings(peak_lr=9.65e-6),
        description="InstructGPT's SFT of 1.3B and 6B: 9.65e-6 (175B: 5.03e-6), cosine to 10 %, no warm-up.",
    )
    batch_size: int = Field(
        default=32, gt=0, description="Sequences a step: InstructGPT's SFT of 1.3B and 6B (175B: 8)."
    )
    epochs: int = Field(default=16, gt=0, description="Passes over the data: InstructGPT's SFT (its ppo-init: 2).")
    steps: int | None = Field(
        default=None,
        gt=0,
        description="Train for this many steps instead of `epochs`, in as many passes as that takes.",
    )
    context_length: int = Field(
        default=2048,
        gt=1,
        description="Longest sequence, and the length of packed rows, in tokens: InstructGPT, all models.",
    )
    residual_dropout: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the residual stream that is dropped (dropout): InstructGPT's SFT.",
    )
    pretraining_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the sequences that are pretraining documents, mixed into every minibatch at random: "
        "0.1 in InstructGPT's ppo-init (appendix C.3); counted in sequences, as the paper names no unit.",
    )
    keep_epochs: bool = Field(
        default=True,
        description="Export every epoch as epoch-NN, to select among; else only the last, as export."
        " InstructGPT selects among the epochs of its SFT.",
    )
    validation_rows: int = Field(
        default=1024, gt=0, description="Validation uses at most this many sequences, the first ones. House default."
    )
    checkpoint_seconds: float = Field(
        default=600.0, gt=0, description="Time between checkpoints to resume from. House default."
    )

    @model_validator(mode="after")
    def _epochs_that_are_kept_are_counted(self) -> "LanguageModelSettings":
        if self.steps is not None and self.keep_epochs:
            raise ValueError("steps and keep_epochs exclude each other: epochs are kept where they are counted")
        return self
