"""What a recipe says about reward-model training. Kept apart from it, so that reading a recipe imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from learners.language_model_settings import SftEpoch
from learners.optimizer import OptimizerSettings


class RewardModelSettings(BaseModel):
    """Reward-model training. Defaults are InstructGPT's (section 3.5 and appendix C.2)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    optimizer: OptimizerSettings = Field(
        default=OptimizerSettings(peak_lr=9e-6), description="InstructGPT: 9e-6, cosine to 10 %."
    )
    batch_prompts: int = Field(default=64, gt=0, description="Rankings a step, whatever their K: InstructGPT.")
    epochs: int = Field(default=1, gt=0, description="Passes over the rankings: InstructGPT; more overfits.")
    start_epoch: SftEpoch = Field(
        default="best_validation",
        description="The SFT epoch that it starts from: the one with the lowest validation loss, or the last. "
        "InstructGPT says the SFT model and not which; house default.",
    )
    normalised_by: Literal["all_pairs", "untied_pairs"] = Field(
        default="all_pairs",
        description="What the sum over the untied pairs of a ranking is divided by: C(K,2), or their number. "
        "InstructGPT drops ties and does not say; house default: C(K,2), so that a pair weighs the same whatever else "
        "was tied.",
    )
    evaluations: int = Field(
        default=4, gt=0, description="Times that held-out accuracy is measured, evenly spaced, the last at the end."
    )
    validation_rankings: int = Field(
        default=1024, gt=0, description="At most this many rankings are held-out, the first. House default."
    )
    bias_demonstrations: int = Field(
        default=1024,
        gt=0,
        description="The bias is set on at most this many demonstrations, drawn at random. House default.",
    )
    checkpoint_seconds: float = Field(
        default=600.0, gt=0, description="Time between checkpoints to resume from. House default."
    )
