"""What a recipe says about generation and about the actors that generate and score."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?{_NAME}={_NAME}")
"""As Kubernetes and Ray write them, without Ray's operators, which the doctor's arithmetic does not know."""


def _checked(labels: dict[str, str]) -> dict[str, str]:
    for label in (f"{key}={value}" for key, value in labels.items()):
        if not _LABEL.fullmatch(label):
            raise ValueError(
                f"{label} is no label: name and value begin and end with a letter or digit, have '.', '_' and '-' "
                "between them and 63 characters at most; the name may have a prefix and '/' before it"
            )
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_checked)]
"""Ray's labels that a node must have, all of them and with these values."""

LABELS = (
    "Ray labels (`ray start --labels`) that a node must have for {} to be placed on it, each with its value. Empty: "
    "any node. `amenable manifests RECIPE` gives each role those of its worker group.{} House default."
)
"""What the field that has them says, but for the role, and what else is true of that one."""


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
        "bias the importance ratio. House default.",
    )


class RolloutSettings(BaseModel):
    """The generators: vLLM engines, one in each actor's own process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    generators: int = Field(default=1, ge=1, description="Number of generator actors. House default for one machine.")
    threads: int = Field(default=1, ge=1, description="CPU threads (and Ray CPUs) of each generator. House default.")
    gpus: float = Field(
        default=0,
        ge=0,
        description="GPUs of each generator; 0 generates on the CPU. Fractions share a GPU: nine tenths of that "
        "fraction of its memory must be free when an engine starts. House default.",
    )
    node_labels: NodeLabels = Field(default={}, description=LABELS.format("a generator", ""))
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Devices that each engine's model is divided over (Megatron-LM, Shoeybi et al. 2019, as vLLM has "
        "it): GPUs of one node, or processes on CPUs. Default: vLLM's.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of generation. float32 is the default on CPUs: the log-probabilities then agree with the "
        "learner's within 1e-4. House default.",
    )
    max_concurrent: int = Field(
        default=128, ge=1, description="Requests an engine works on at once; the house default, fit for CPU engines."
    )
    kv_cache_mib: int = Field(
        default=128,
        ge=1,
        description="Memory for keys and values of each engine, in MiB, divided over its devices. House default for "
        "tiny models.",
    )
    kv_on_publish: Literal["recompute", "keep"] = Field(
        default="recompute",
        description="Keys and values of running responses when new weights are loaded. `recompute`: computed again "
        "under the new weights, so that each token's log-probability is that of the weights that wrote it. `keep`: "
        "read on as older weights wrote them, which pauses less and biases the log-probabilities of the rest "
        "([Publication](reliability.md#publication)). House default.",
    )
    transport: Literal["auto", "object_store", "ipc"] = Field(
        default="auto",
        description="How new weights reach the engines. `object_store`: through host memory and Ray's object store, "
        "wherever learner and generators are. `ipc`: vLLM's CUDA IPC, for one learner rank and generators on the same "
        "GPU; not run on a GPU. `auto` is object_store, with GPUs too: it is what is known to work. House default.",
    )

    @model_validator(mode="after")
    def _has_devices_for_all_ranks(self) -> Self:
        ranks = self.tensor_parallel
        if ranks == 1:
            return self
        if self.gpus not in (0, ranks):
            raise ValueError(
                f"gpus {self.gpus:g} of each generator is not tensor_parallel {ranks}: its model is divided over whole "
                f"GPUs; give rollouts.gpus={ranks}, or 0 to generate on CPUs"
            )
        if self.transport == "ipc":
            raise ValueError(
                f"transport ipc is for a GPU that learner and generator share, and tensor_parallel {ranks} divides a "
                "generator over several; use object_store"
            )
        if self.gpus == 0 and self.threads < ranks:
            raise ValueError(
                f"threads {self.threads} of each generator is less than tensor_parallel {ranks}: each of its processes "
                f"computes on a CPU of its own; give rollouts.threads={ranks} or more"
            )
        if self.gpus == 0 and self.dtype == "bfloat16":
            raise ValueError(
                f"dtype bfloat16 with tensor_parallel {ranks} on CPUs: vLLM's CPU engines in processes of their own "
                "die in bfloat16; use float32"
            )
        return self


class ScoringSettings(BaseModel):
    """The processes that host the reward scorer and the frozen reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fused: bool = Field(
        default=True,
        description="Whether one process hosts both reward scorer and reference (small machines), or each has its own."
        " House default.",
    )
    scorers: int = Field(default=1, ge=1, description="Number of reward-scorer processes. House default.")
    references: int = Field(
        default=1, ge=1, description="Number of reference processes; ignored where fused. House default."
    )
    threads: int = Field(
        default=1, ge=1, description="CPU threads (and Ray CPUs) of each scoring process. House default."
    )
    gpus: float = Field(
        default=0, ge=0, description="GPUs of each scoring process; 0 scores on the CPU. House default."
    )
    node_labels: NodeLabels = Field(default={}, description=LABELS.format("a scoring process", ""))
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of the reference and reward networks. float32 agrees with the engine's. House default.",
    )
    rows_per_batch: int = Field(
        default=32,
        ge=1,
        description="Rows of one forward pass of reward model or reference; fixed, so that a score does not depend on "
        "what else is waiting. House default.",
    )


class FleetSettings(BaseModel):
    """Health of generators and scoring processes while PPO runs: who is given up when, and how often it is replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    heartbeat_s: float = Field(
        default=5.0, gt=0, description="Seconds between two heartbeats that are asked of every worker. House default."
    )
    suspect_after_s: float = Field(
        default=20.0, gt=0, description="Seconds of silence after which a worker is given no new work. House default."
    )
    dead_after_s: float = Field(
        default=90.0,
        gt=0,
        description="Seconds of silence after which a worker is killed and replaced. House default: a busy machine of "
        "two cores answers within a few seconds.",
    )
    stall_after_s: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds without the end of an engine step, or of a call that scores, after which a worker that "
        "does answer is killed and replaced. House default, above the longest of either.",
    )
    restarts: int = Field(
        default=5,
        ge=0,
        description="Restarts of generators, and as many of scoring processes, within `restart_window_s`; the run "
        "stops where more are needed. House default.",
    )
    restart_window_s: float = Field(
        default=3600.0, gt=0, description="Seconds of the window in which `restarts` are counted. House default."
    )
    start_deadline_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds for a replacement to start and load its model. House default, above the slowest start of "
        "an engine on a CPU.",
    )
    minimum_deadline_s: float = Field(
        default=1200.0,
        gt=0,
        description="Seconds for which fewer than the smallest number of workers of a role may serve before the run "
        "stops. House default: two starts.",
    )
    min_generators: int = Field(default=1, ge=1, description="Generators that must serve. House default.")
    min_scorers: int = Field(default=1, ge=1, description="Reward scorers that must serve. House default.")
    min_references: int = Field(default=1, ge=1, description="References that must serve. House default.")
    max_generators: int = Field(
        default=1,
        ge=1,
        description="Generators for which a Ray session of one machine has CPUs, where that is more than "
        "`rollouts.generators`: scaling out can start so many there. A cluster has what it has. House default.",
    )
    placement_deadline_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds after which a generator whose placement group waits for room is told of. House default.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.heartbeat_s <= self.suspect_after_s <= self.dead_after_s:
            raise ValueError(
                f"heartbeat_s {self.heartbeat_s:g}, suspect_after_s {self.suspect_after_s:g} and dead_after_s "
                f"{self.dead_after_s:g} should not fall: a worker is asked, then suspected, then given up"
            )
        return self
