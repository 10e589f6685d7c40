"""Settings of one optimiser and its learning-rate schedule."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]
"""The decay of a running mean: at 1 it would never see a gradient, above it diverges."""


class OptimizerSettings(BaseModel):
    """AdamW and its schedule. A loop asks `learning_rate` for every step and hands the answer to `Engine.step`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    peak_lr: float = Field(ge=0, description="Highest learning rate. InstructGPT's differ by stage and size.")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), description="Adam's betas, each from 0 to below 1: InstructGPT, all models."
    )
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon: PyTorch's default, as InstructGPT states none.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay on matrices (not on biases and norms): InstructGPT states none.",
    )
    gradient_clip: float | None = Field(
        default=None, gt=0, description="Largest global gradient norm; None is off. InstructGPT states none."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="InstructGPT: cosine for SFT and the reward model, constant for PPO."
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Linear warm-up: InstructGPT has none in SFT, 10 iterations in PPO."
    )
    warmup_start_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Share of the peak at the first warm-up step: InstructGPT's PPO."
    )
    final_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the peak that the cosine decays to: InstructGPT's SFT and reward model.",
    )

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of step `step` (counted from 0) of `total_steps`; past the end it stays at the last value."""
        if step < self.warmup_steps:
            start = self.warmup_start_fraction
            return self.peak_lr * (start + (1 - start) * step / self.warmup_steps)
        if self.schedule == "constant":
            return self.peak_lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak_lr * (self.final_fraction + (1 - self.final_fraction) * cosine)
