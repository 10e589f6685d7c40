"""What a recipe says about generation and about the actors that generate and score."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SamplingSettings(BaseModel):
    """How a response is drawn. The same temperature is used by rollouts, reference and update, or KL is inflated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of rollouts. InstructGPT: 1.")
    max_response_tokens: int = Field(
        default=1024, gt=0, description="A response is cut here, and then has no end-of-text. InstructGPT: at most 1k."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling. PPO refuses any value but 1: the log-probabilities of a truncated distribution "
        "bias the importance ratio.",
    )


class RolloutSettings(BaseModel):
    """The generators: vLLM engines, one in each actor's own process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    generators: int = Field(default=1, ge=1, description="Number of generator actors. House default for one machine.")
    threads: int = Field(default=1, ge=1, description="CPU threads (and Ray CPUs) of each generator. House default.")
    gpus: float = Field(
        default=0, ge=0, description="GPUs of each generator (fractions share a GPU); 0 generates on the CPU."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of generation. float32 is the default on CPUs: the log-probabilities then agree with the "
        "learner's within 1e-4.",
    )
    max_concurrent: int = Field(
        default=128, ge=1, description="Requests an engine works on at once; the house default, fit for CPU engines."
    )
    kv_cache_mib: int = Field(
        default=128,
        ge=1,
        description="Memory for keys and values of each engine, in MiB. House default for tiny models.",
    )


class ScoringSettings(BaseModel):
    """The processes that host the reward scorer and the frozen reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fused: bool = Field(
        default=True,
        description="Whether one process hosts both reward scorer and reference (small machines), or each has its own.",
    )
    scorers: int = Field(default=1, ge=1, description="Number of reward-scorer processes. House default.")
    references: int = Field(default=1, ge=1, description="Number of reference processes; ignored where fused.")
    threads: int = Field(
        default=1, ge=1, description="CPU threads (and Ray CPUs) of each scoring process. House default."
    )
    gpus: float = Field(default=0, ge=0, description="GPUs of each scoring process; 0 scores on the CPU.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the reference and reward networks. float32 agrees with the engine's."
    )
    rows_per_batch: int = Field(
        default=32,
        ge=1,
        description="Rows of one forward pass of reward model or reference; fixed, so that a score does not depend on "
        "what else is waiting.",
    )
