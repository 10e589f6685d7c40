"""What a recipe says about the engine. Kept apart from it, so that reading a recipe imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """How one model is trained on the machine: nothing here changes what is learned, but for rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="DeepSpeed ZeRO stage: what is sharded over ranks (1 optimiser, 2 and gradients, 3 and weights). "
        "Stage 0 in bfloat16 runs as stage 1, the first at which DeepSpeed accumulates gradients in float32."
        " House default.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of compute; masters, gradient sums and moments are float32, as InstructGPT's.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute each layer in the backward pass: less memory for about a third more time."
        " House default.",
    )
    tokens_per_microbatch: int = Field(
        default=8192,
        gt=0,
        description="Tokens that one forward and backward pass holds at most; set by memory alone. Pads count where "
        "the architecture cannot do without them; elsewhere attention alone works on pads, up to 4 times as many."
        " House default.",
    )
