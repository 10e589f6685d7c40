"""The shape of a small model, as a recipe states it. Kept apart, so that reading a recipe imports no torch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TinyLlamaSettings(BaseModel):
    """The shape of a small Llama that is trained from nothing.

    Sources: "prototype" is a one-thread prototype of the built-in world, whose 0.52M-parameter model these are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden_size: int = Field(default=128, gt=0, description="Width of the residual stream (prototype).")
    layers: int = Field(default=3, gt=0, description="Decoder layers (prototype).")
    heads: int = Field(default=4, gt=0, description="Attention heads; vLLM must serve the head size (prototype).")
    key_value_heads: int | None = Field(default=None, gt=0, description="Key-value heads; none means as many as heads.")
    mlp_size: int = Field(default=256, gt=0, description="Inner width of the gated MLP (prototype).")
    context_length: int = Field(
        default=2048, gt=0, description="Longest sequence in tokens; rotary positions cost no weights. House default."
    )
    tied_embeddings: bool = Field(default=True, description="The unembedding is the embedding (prototype).")
    initial_std: float = Field(default=0.08, gt=0, description="Standard deviation of initial weights (prototype).")
    rope_theta: float = Field(
        default=100.0,
        gt=0,
        description="Rotary base (prototype: copying from the prompt was learned with 100, not with 10,000).",
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of RMS normalisation (Llama 2).")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be heads ({self.heads}) times an even number")
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of key_value_heads {self.key_value_heads}")
        return self
