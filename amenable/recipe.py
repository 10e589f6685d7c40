"""The recipe: everything a run is told, composed of the slices that the rooms own."""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from actors.rewards import RewardSettings
from actors.settings import LABELS, FleetSettings, NodeLabels, RolloutSettings, SamplingSettings, ScoringSettings
from amenable.run_names import check_run_name
from corpus.files import FileCorpusSettings
from corpus.tokenising import TokenLimits
from corpus.world import WorldSettings
from learners.engine_settings import EngineSettings
from learners.language_model_settings import LanguageModelSettings, SftEpoch
from learners.optimizer import OptimizerSettings
from learners.ppo_settings import PpoSettings
from learners.ranks import Placement
from learners.reward_model_settings import RewardModelSettings
from learners.tracking import TrackingSettings
from models.settings import TinyLlamaSettings
from serving.settings import ServingSettings


def _run_directory_for(values: dict[str, Any]) -> str:
    return str(Path("runs") / values["name"])


def _as_text(place: Any) -> Any:
    return os.fspath(place) if isinstance(place, os.PathLike) else place


class _Slice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Slice):
    """Which language model the run starts from."""

    base: str | None = Field(
        default=None,
        description="A Hugging Face causal language model: a local directory or a name. None trains a small one on "
        "the corpus's pretraining text first.",
    )
    shape: TinyLlamaSettings = Field(
        default=TinyLlamaSettings(), description="The small model, where there is no base."
    )
    vocab_size: int = Field(
        default=2048,
        ge=259,
        description="Byte-level BPE vocabulary learnt from files where there is no base; "
        "the built-in world has its own words. House default.",
    )


LIE_THERE_TOO = " The run's stream, conductor, weight store and desk lie there too: their loss ends the command."


class LearnerSettings(_Slice):
    """The learner group: Ray Train workers with DeepSpeed engines."""

    workers: int = Field(
        default=1, ge=1, description="Ranks of the group. One is fastest on a small machine (measured)."
    )
    threads: int = Field(default=1, ge=1, description="CPU threads (and Ray CPUs) of each rank. House default.")
    gpus: float = Field(default=0, ge=0, description="GPUs of each rank; 0 trains on the CPU. House default.")
    placement: Placement = Field(
        default="pack",
        description="How the ranks lie on the nodes. `pack`: on as few as there is room on, so that gradients go over "
        "the fast links within a node. `strict_pack`: on one node, or the run does not start. `spread`: on as many as "
        "there are. Default: Ray Train's.",
    )
    node_labels: NodeLabels = Field(default={}, description=LABELS.format("a rank", LIE_THERE_TOO))
    start_deadline_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds for all ranks to be ready, at first and after each restart. House default.",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Times that the group is started anew after the death of a rank; a machine that is taken away with "
        "notice does not count. House default.",
    )
    silence_s: float = Field(
        default=60.0,
        ge=10,
        description="Seconds without a sign of life after which a rank is killed; signs come every two seconds from a "
        "thread beside the training. House default.",
    )
    stall_s: float = Field(
        default=7200.0,
        gt=0,
        description="Seconds after which a rank is killed whose loop neither reports nor asks whether to stop, though "
        "it gives signs of life. House default: above every deadline that a training loop keeps itself.",
    )
    stop_grace_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds for the checkpoint of a run that is asked to stop; without one by then the command ends "
        "with exit code 1. House default; keep it below what your scheduler grants between SIGTERM and SIGKILL.",
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="DeepSpeed: ZeRO stage, dtype, micro-batches.")


class CollectSettings(_Slice):
    """Fresh comparisons: K responses of the SFT model to each prompt, ranked by labelers."""

    min_responses: int = Field(default=4, ge=2, description="Smallest K. InstructGPT: K = 4 to 9.")
    max_responses: int = Field(default=9, ge=2, description="Largest K. InstructGPT: K = 4 to 9.")
    sampled_epoch: SftEpoch = Field(
        default="best_validation",
        description="The SFT epoch that answers: the one with the lowest validation loss, or the last. InstructGPT "
        "says the SFT policies and not which; house default.",
    )
    held_out_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of users whose rankings validate the reward model; they ask what no training row asks "
        "(world.validation_share). House default; "
        "InstructGPT holds out 11 to 35 % of prompts.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_responses < self.min_responses:
            raise ValueError(
                f"max_responses {self.max_responses} is less than min_responses {self.min_responses}; raise it"
            )
        return self


class SelectionSettings(_Slice):
    """Which SFT epoch is the baseline: the one whose responses the reward model scores best (InstructGPT, 3.5)."""

    prompts: int = Field(default=256, ge=1, description="Validation prompts sampled for each epoch. House default.")


class EvaluationSettings(_Slice):
    """The samples that results and report are made of."""

    prompts: int = Field(default=400, ge=1, description="Held-out prompts. House default.")
    samples_per_prompt: int = Field(
        default=2, ge=1, description="Answers of every model to each prompt. House default."
    )
    pretraining_documents: int = Field(
        default=256, ge=1, description="Held-out documents for the pretraining loss (alignment tax). House default."
    )


class LimitSettings(_Slice):
    """What a run may use up before it stops, with a checkpoint to go on from."""

    gpu_hours: float | None = Field(
        default=None,
        gt=0,
        description="GPU-hours of the whole run, all its attempts together: the GPUs that its roles hold, for as long "
        "as they hold them. Once they are used up the run stops after a checkpoint; with a higher limit the same "
        "command continues. House option; off.",
    )


class Recipe(_Slice):
    """What a run is told. Frozen; a key that is not listed here is refused."""

    name: Annotated[str, AfterValidator(check_run_name)] = Field(
        description="Name of the run; it also names its directory."
    )
    run_directory: Annotated[str, BeforeValidator(_as_text), Field(min_length=1)] = Field(
        default_factory=_run_directory_for,
        description="Where the run is kept: a directory, or an address in an object store (s3://…, gs://…; "
        "docs/reliability.md). Default: runs/NAME in the directory the command is started in. House default.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,  # what every library that is seeded takes
        description="Seed of every random choice of the run. Default 0: the project's choice; the paper gives none.",
    )
    deadline_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds for one answer of a generator or scoring process (a slice of samples or scores, a model "
        "that is loaded); the run ends where none has come for that long. House default.",
    )
    corpus: FileCorpusSettings | None = Field(
        default=None, description="Files (or Hub datasets) to train on. None: the built-in world."
    )
    world: WorldSettings = Field(default=WorldSettings(), description="The built-in world, where there is no corpus.")
    tokens: TokenLimits = Field(default=TokenLimits(), description="Length limits of prompts, responses and sequences.")
    model: ModelSettings = Field(default=ModelSettings(), description="The language model the run starts from.")
    learners: LearnerSettings = Field(default=LearnerSettings(), description="Who learns.")
    rollouts: RolloutSettings = Field(default=RolloutSettings(), description="Who generates.")
    scoring: ScoringSettings = Field(default=ScoringSettings(), description="Who scores.")
    fleet: FleetSettings = Field(default=FleetSettings(), description="Health of those who generate and score in PPO.")
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="How responses are drawn, everywhere.")
    base: LanguageModelSettings = Field(
        default=LanguageModelSettings(
            optimizer=OptimizerSettings(peak_lr=3e-3, warmup_steps=50, weight_decay=0.1),
            epochs=1,
            residual_dropout=0.0,
            keep_epochs=False,
        ),
        description="Base training, where there is no base model. Defaults: a prototype of the built-in world.",
    )
    sft: LanguageModelSettings = Field(default=LanguageModelSettings(), description="Supervised fine-tuning.")
    collect: CollectSettings = Field(default=CollectSettings(), description="Fresh comparisons, where none are given.")
    rm: RewardModelSettings = Field(default=RewardModelSettings(), description="Reward-model training.")
    select_sft: SelectionSettings = Field(default=SelectionSettings(), description="Choice of the SFT baseline.")
    ppo_init: LanguageModelSettings = Field(
        default=LanguageModelSettings(
            optimizer=OptimizerSettings(peak_lr=5e-6), epochs=2, pretraining_share=0.1, keep_epochs=False
        ),
        description="The model PPO starts from, which is also its frozen reference. InstructGPT: 2 epochs of SFT with "
        "a 10 % pretraining mix; its peak learning rate for 1.3B is 5e-6 (appendix C.3).",
    )
    reward: RewardSettings = Field(default=RewardSettings(), description="What PPO is rewarded with.")
    ppo: PpoSettings = Field(default=PpoSettings(), description="PPO-ptx.")
    evaluation: EvaluationSettings = Field(default=EvaluationSettings(), description="The final evaluation.")
    serving: ServingSettings = Field(
        default=ServingSettings(), description="The service of `amenable serve RUN`, and what PPO leaves for it."
    )
    tracking: TrackingSettings = Field(default=TrackingSettings(), description="Trackers that metrics go to as well.")
    limits: LimitSettings = Field(default=LimitSettings(), description="When the run stops of itself.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        limits = self.tokens
        if self.sampling.top_p < 1:
            raise ValueError(
                f"sampling.top_p {self.sampling.top_p} is refused for PPO: log-probabilities of a truncated "
                "distribution bias the importance ratio; give 1"
            )
        if self.sampling.max_response_tokens > limits.max_response_tokens:
            raise ValueError(
                f"sampling.max_response_tokens {self.sampling.max_response_tokens} is more than "
                f"tokens.max_response_tokens {limits.max_response_tokens}"
            )
        if self.model.base is None and self.model.shape.context_length < limits.context_tokens:
            raise ValueError(
                f"model.shape.context_length {self.model.shape.context_length} is less than tokens.context_tokens "
                f"{limits.context_tokens}"
            )
        if self.ppo.batch_size % self.learners.workers:
            raise ValueError(
                f"ppo.batch_size {self.ppo.batch_size} does not divide over learners.workers {self.learners.workers}"
            )
        if self.limits.gpu_hours is not None and self.gpus == 0:
            raise ValueError(
                f"limits.gpu_hours {self.limits.gpu_hours:g} can never be reached, because no role has a GPU; leave it "
                "out, or give learners.gpus, rollouts.gpus or scoring.gpus"
            )
        return self

    @property
    def gpus(self) -> float:
        """GPUs that all roles hold together, as many generators as the recipe says."""
        scoring = self.scoring
        return (
            self.learners.workers * self.learners.gpus
            + self.rollouts.generators * self.rollouts.gpus
            + (scoring.scorers + (0 if scoring.fused else scoring.references)) * scoring.gpus
        )

    @property
    def synthetic(self) -> bool:
        """Whether the run's people are the built-in world's simulated ones."""
        return self.corpus is None
