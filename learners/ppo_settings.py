"""What a recipe says about PPO. Defaults are InstructGPT's, or, where it is silent, from whom each one says."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learners.optimizer import OptimizerSettings


class PpoSettings(BaseModel):
    """PPO with a per-token KL penalty and a pretraining term (PPO-ptx), InstructGPT section 3.5 and appendix C.4."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    updates: int = Field(default=500, ge=1, description="Batches trained; 500 × 512 are InstructGPT's 256k episodes.")
    batch_size: int = Field(
        default=512, ge=1, description="Episodes an update. InstructGPT: 512, the best of 64 to 1024."
    )
    minibatches: int = Field(
        default=8, ge=1, description="Optimiser steps a pass over the batch. InstructGPT: 8 of 64 each."
    )
    inner_epochs: int = Field(
        default=1, ge=1, description="Passes over each batch. InstructGPT: 1 (Ziegler's code: 4)."
    )
    chunk_size: int = Field(
        default=32, ge=1, description="Slots leased and scored together; must divide batch_size. House default."
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Updates by which the weights that wrote a trained token may be older than those it trains. "
        "0, strictly on-policy, as in InstructGPT; 1 lets generators work while the learner does.",
    )

    kl_coefficient: float = Field(default=0.02, ge=0, description="β of the per-token KL penalty. InstructGPT: 0.02.")
    kl_controller: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="InstructGPT: fixed. 'adaptive' steers β to kl_target (Ziegler's code)."
    )
    kl_target_nats: float = Field(
        default=6.0, gt=0, description="Nats a SEQUENCE that 'adaptive' aims at. Ziegler's code: 6."
    )
    kl_horizon_episodes: int = Field(
        default=10_000, ge=1, description="Episodes over which β adapts. Ziegler's code: 10,000."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1", description="Per-token estimator in the reward. InstructGPT's objective, Ziegler and N+ code: k1."
    )
    kl_budget_nats: float | None = Field(
        default=None,
        gt=0,
        description="Stop once the batch's mean KL exceeds this, in nats a sequence. House option; off.",
    )

    discount: float = Field(default=1.0, ge=0, le=1, description="γ of returns. InstructGPT: 1 (a bandit).")
    trace: float = Field(
        default=0.95, ge=0, le=1, description="λ of GAE. Not in InstructGPT; Ziegler and Stiennon: 0.95."
    )
    clip: float = Field(default=0.2, gt=0, description="Clip of the policy's ratio. InstructGPT: 0.2.")
    value_clip: float = Field(
        default=0.2, gt=0, description="Clip of values around OLD values. Ziegler and N+ code: 0.2."
    )
    value_coefficient: float = Field(
        default=0.1,
        gt=0,
        description="Factor on the value loss. Ziegler and N+ code: 0.1. With a network and an Adam of its own it "
        "matters only through epsilon and gradient clipping.",
    )
    entropy_coefficient: float = Field(
        default=0.0, ge=0, description="Factor on an entropy bonus. Not in InstructGPT; Ziegler and N+ code have none."
    )
    whiten_advantages: bool = Field(
        default=True, description="Centre and scale over the batch. Ziegler and N+ code: yes."
    )
    whiten_rewards: bool = Field(
        default=False, description="Scale per-token rewards, keeping their mean. N+ code: off; Ziegler's code: on."
    )
    missing_eos: Literal["replace", "subtract", "none"] = Field(
        default="replace", description="What a response without end-of-text scores. N+ code replaces; TRL subtracts."
    )
    missing_eos_score: float = Field(default=-1.0, description="The score that 'replace' gives. N+ code: −1.")
    missing_eos_penalty: float = Field(default=1.0, ge=0, description="What 'subtract' takes off the score. TRL: 1.")

    old_logprobs: Literal["behaviour", "recomputed"] = Field(
        default="behaviour",
        description="Denominator of the ratio: the engine's log-probs, or the learner's own before its first step "
        "(one more forward pass). House default: behaviour, whose difference from the learner is measured after every "
        "publication, and at staleness 0 on the batch itself.",
    )
    decoupled: bool = Field(
        default=False,
        description="Decoupled objective (Hilton et al. 2022): clip around the learner's policy, weight by "
        "learner/behaviour. Needs old_logprobs: recomputed. Off, as in InstructGPT.",
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="Cap of the importance weights of 'decoupled' (truncated importance sampling)."
    )

    ptx_coefficient: float = Field(
        default=27.8, ge=0, description="γ of the pretraining term. InstructGPT's PPO-ptx: 27.8; 0 is plain PPO."
    )
    ptx_per_episode: int = Field(default=8, ge=1, description="Pretraining documents an episode. InstructGPT: 8.")
    ptx_loss: Literal["token_mean", "sequence_sum"] = Field(
        default="token_mean",
        description="Mean over pretraining tokens, or sum over a document's tokens averaged over documents. "
        "InstructGPT does not say; house default: the mean.",
    )
    ptx_context: int = Field(
        default=2048,
        gt=1,
        description="Documents are cut here, in tokens, or where the model's context ends. InstructGPT: context 2k.",
    )

    policy: OptimizerSettings = Field(
        default=OptimizerSettings(peak_lr=8.05e-6, schedule="constant", warmup_steps=10, eps=1e-5),
        description="The policy's optimiser. InstructGPT states no final rate: its sweep is 2.55e-6 to 2.55e-5, and "
        "above 8.05e-6 PPO diverged without ptx. Constant after 10 warm-up updates from 0.1 × peak; Adam's epsilon "
        "1e-5 is the N+ code's. Steps of the schedule are updates.",
    )
    value: OptimizerSettings = Field(
        default=OptimizerSettings(peak_lr=9e-6, schedule="constant", eps=1e-5),
        description="The value network's optimiser. InstructGPT: a fixed 9e-6 (175B: 5e-6); epsilon as the policy's.",
    )
    critic_warmup_updates: int = Field(
        default=0,
        ge=0,
        description="First updates in which only the value network moves; the policy's warm-up and an adaptive β begin "
        "after them. House option; InstructGPT: none.",
    )
    ema_decay: float = Field(
        default=0.992, ge=0, lt=1, description="Decay of the weights' moving average. InstructGPT: 0.992."
    )
    ema_every: Literal["step", "update"] = Field(
        default="step",
        description="When the average is taken: InstructGPT does not say; house default: every optimiser step.",
    )

    mismatch_bound_nats: float | None = Field(
        default=None,
        gt=0,
        description="Largest |log-ratio| between engine and learner on tokens of the learner's own version; beyond it "
        "the run stops. None: in float32 1e-4 on an update's first minibatch at staleness 0 (measured: 4e-6 to 4e-5), "
        "1e-3 elsewhere (the probe; recomputed log-probs, of the whole batch), 1.0 where either computes in bfloat16.",
    )
    min_effective_sample_size: float | None = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Least effective sample size of a batch, as a share of its tokens, before its first step "
        "(staleness/effective_sample_size); below it the run stops. It is 1, up to rounding, where the learner's own "
        "weights wrote the tokens; at 0.1 an update would rest on no more than a tenth of them. None: logged only. "
        "House default.",
    )
    straggler_bound_s: float | None = Field(
        default=None,
        gt=0,
        description="Most seconds from lease to acceptance of a batch's slowest episode; beyond it the run stops. "
        "None: logged only, because a slow episode is no wrong one: lease_s has it generated again, and "
        "batch_deadline_s ends a run whose batch never comes. House option; off.",
    )
    evaluate_every: int = Field(
        default=25, ge=1, description="Updates between samples of held-out prompts under the EMA policy. House default."
    )
    evaluation_prompts: int = Field(default=64, ge=1, description="Held-out prompts sampled then. House default.")
    checkpoint_every: int = Field(default=25, ge=1, description="Updates between checkpoints. House default.")
    checkpoints_kept: int = Field(
        default=2,
        ge=1,
        description="Newest checkpoints that are kept while PPO trains, beside that of the update whose policy is the "
        "best so far and those that a person pinned (docs/reliability.md). House default: 2, so that there is one to "
        "go back to where the newest is damaged.",
    )
    lease_s: float = Field(
        default=300.0, gt=0, description="Seconds until a chunk that did not come back is leased again. House default."
    )
    batch_deadline_s: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds the learner waits for a batch before it names who owes it and stops. House default.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.minibatches} minibatches; "
                f"give a multiple of {self.minibatches}"
            )
        if self.batch_size % self.chunk_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a whole number of chunks; give a chunk_size that divides it, "
                f"not {self.chunk_size}"
            )
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates {self.critic_warmup_updates} leaves the policy none of the {self.updates} "
                "updates; give fewer"
            )
        if self.decoupled and self.old_logprobs != "recomputed":
            raise ValueError("decoupled needs old_logprobs: recomputed (the proximal policy is the learner's own)")
        if self.importance_cap is not None and not self.decoupled:
            raise ValueError("importance_cap caps the weights of the decoupled objective; set decoupled: true")
        return self
