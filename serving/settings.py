"""What a recipe says about serving: engines, limits of a request, and snapshots for other clusters."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Limits(BaseModel):
    """What one request may ask for, and how many there may be. All are per replica: a service of N replicas takes N
    times as many at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    body_bytes: int = Field(
        default=1 << 20, ge=1024, description="Largest request body; a larger one is answered 413. House default."
    )
    prompts: int = Field(
        default=32, ge=1, description="Prompts of one completion request; more are answered 400. House default."
    )
    prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt, tokens; a longer one is answered 400. None: what the context holds beside one "
        "token.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest max_tokens; more is answered 400. None: `sampling.max_response_tokens`.",
    )
    n: int = Field(
        default=8, ge=1, description="Largest n (choices of one prompt); more is answered 400. House default."
    )
    sequences: int = Field(
        default=64,
        ge=1,
        description="Prompts times n of one request, at most; more are answered 400. House default.",
    )
    stop: int = Field(
        default=4, ge=0, description="Stop strings of a request, each of at most 64 characters. OpenAI's API takes 4."
    )
    logprobs: int = Field(default=5, ge=0, description="Largest logprobs or top_logprobs. OpenAI's completions take 5.")
    score_pairs: int = Field(
        default=256, ge=1, description="Responses of one score request; more are answered 400. House default."
    )
    concurrent: int = Field(
        default=256,
        ge=1,
        description="Generating and scoring requests under way or queued in the engines; one more is answered 429 with "
        "Retry-After. House default: twice what an engine works on at once.",
    )
    receive_s: float = Field(
        default=30.0, gt=0, description="Seconds for a whole body to arrive; later is answered 408. House default."
    )
    request_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds of one request, queueing included; after them it is ended, with 503 where nothing was "
        "sent yet. House default.",
    )


class ServingSettings(BaseModel):
    """The service of `amenable serve RUN`, and what PPO leaves for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    publish_every: int = Field(
        default=1,
        ge=0,
        description="PPO leaves every so many updates' weights in RUN/published, where a service that is not in the "
        "same Ray cluster finds them; 0 leaves none. They are hard links to the weight store's files where the file "
        "system has those. House default.",
    )
    published_kept: int = Field(
        default=3,
        ge=1,
        description="The newest snapshots in RUN/published that are kept; one that the service is pinned to stays too. "
        "House default.",
    )
    memory_budget_gib: float = Field(
        default=6.0,
        gt=0,
        description="Memory for the engines of one replica, GiB; so many engines are started as fit. House default: "
        "two.",
    )
    engine_gib: float = Field(
        default=2.5,
        gt=0,
        description="Memory that one engine is reckoned to take, GiB. Measured for tiny models on a CPU: 1.0 resident, "
        "1.7 with the worker apart, keys and values beside it. The replica's own process, 0.8, is not in the budget.",
    )
    loaded: tuple[str, ...] = Field(
        default=("policy", "sft"),
        description="Models that engines hold when the service starts, as far as there are engines. Other names are "
        "loaded when they are asked for, in place of the one that was used least recently. House default.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Dtype of the engines. House default for CPUs: bfloat16 engines in processes of their own died "
        "there.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of each engine. House default.")
    worker_apart: bool | None = Field(
        default=None,
        description="Without a GPU: whether the model's worker has a process beside that of the engine's loop, which "
        "then waits by spinning on a core. None: where the cores of the machine, or of the container, are more than "
        "threads + 1 for each engine of max_replicas. Measured in bench/README.md: slower where the two use up the "
        "cores, or share them.",
    )
    gpus: float = Field(
        default=0, ge=0, description="GPUs of each replica, shared by its engines; 0 serves on the CPU. House default."
    )
    max_concurrent: int = Field(
        default=128, ge=1, description="Sequences that one engine works on at once. House default, as in rollouts."
    )
    kv_cache_mib: int = Field(
        default=256, ge=1, description="Memory for keys and values of each engine, MiB. House default for tiny models."
    )
    kv_on_publish: Literal["keep", "recompute"] = Field(
        default="keep",
        description="Keys and values of running responses of `policy` when newer weights are put in. `keep`: read on "
        "as older weights wrote them. `recompute`: computed again under the newer weights, for which every response "
        "waits. House default; both are measured in bench/README.md.",
    )
    score: bool = Field(
        default=True, description="Whether the run's reward model is served too (/v1/score). House default."
    )
    min_replicas: int = Field(default=1, ge=1, description="Replicas that are always there. House default.")
    max_replicas: int = Field(
        default=1, ge=1, description="Replicas that Ray Serve may scale out to under load. House default."
    )
    follow_s: float = Field(
        default=0.5,
        gt=0,
        description="Seconds between two looks for newer weights and for what is wanted. House default.",
    )
    stall_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds without a sign of life of an engine's loop after which the replica is replaced. House "
        "default, above the longest step of a CPU engine.",
    )
    load_deadline_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds for an engine to take another version or model, the end of running requests of the former "
        "model included. House default.",
    )
    start_deadline_s: float = Field(
        default=600.0, gt=0, description="Seconds for a replica to start. House default, as of generators."
    )
    log_prompts: bool = Field(
        default=False, description="Whether prompts are written to the log. House default: never, unless asked for."
    )
    limits: Limits = Field(default=Limits(), description="Limits of requests.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.engine_gib > self.memory_budget_gib:
            raise ValueError(
                f"memory_budget_gib {self.memory_budget_gib:g} does not hold one engine of engine_gib "
                f"{self.engine_gib:g}; raise it"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}; raise it"
            )
        return self

    @property
    def engines(self) -> int:
        """How many engines fit the memory of a replica."""
        return int(self.memory_budget_gib // self.engine_gib)
