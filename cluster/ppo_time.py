"""Seconds of one PPO update: who works how long on what, and who waits for whom. Pure arithmetic.

The work is counted in FLOP and bytes; a device does it at a share of its peak that `Constants` states. Sources: a pass
over a token costs 2 FLOP a weight and 2 · layers · attention width · sequence length for attention, a backward pass
twice as much (Kaplan et al. 2020, section 2.1); an engine step reads all weights and the keys and values of every
running sequence (Pope et al. 2022, section 2).
"""

from dataclasses import dataclass, replace

from actors.settings import RolloutSettings, SamplingSettings, ScoringSettings
from cluster.hardware import Hardware
from cluster.memory import ELEMENT_BYTES, sequences_that_fit
from learners.engine_settings import EngineSettings
from learners.ppo_settings import PpoSettings
from models.shape import ModelShape


@dataclass(frozen=True)
class Learners:
    """The learner group: ranks, and devices of each (GPUs, or CPU threads where there are none)."""

    workers: int
    devices: float
    engine: EngineSettings


@dataclass(frozen=True)
class Machines:
    """The kind of device that each role computes on."""

    learners: Hardware
    generators: Hardware
    scoring: Hardware


@dataclass(frozen=True)
class PpoWork:
    """All that an update's time depends on. Devices of generators and scoring processes are of each one."""

    machines: Machines
    shape: ModelShape
    ppo: PpoSettings
    sampling: SamplingSettings
    max_prompt_tokens: int
    learners: Learners
    rollouts: RolloutSettings
    generator_devices: float
    scoring: ScoringSettings
    scoring_devices: float

    def with_generators(self, generators: int) -> "PpoWork":
        """The same with another number of generators."""
        return replace(self, rollouts=self.rollouts.model_copy(update={"generators": generators}))


@dataclass(frozen=True)
class Constants:
    """What arithmetic cannot know. The defaults are assumptions; `cluster.calibration` measures them in a run."""

    train_share: float = 0.35
    """Of the peak, in forward and backward passes of the learner. Well-tuned training of large models reaches 0.4 to
    0.5 (PaLM, Chowdhery et al. 2022, section 4.1); this program uses no fused kernels of its own."""
    forward_share: float = 0.35
    """Of the peak, in forward passes of learner, scoring and an engine's reading of prompts."""
    bandwidth_share: float = 0.6
    """Of the memory bandwidth, in an engine step that writes one token for each sequence."""
    engine_step_s: float = 0.02
    """Seconds of an engine step beside its arithmetic: vLLM's scheduler and sampler, without CUDA graphs."""
    all_reduce_s: float = 2e-5
    """Seconds of one sum over the devices of a divided engine, two a layer in every step (Megatron-LM, Shoeybi et al.
    2019, section 3): the latency of NCCL within a node, the bytes being few."""
    optimizer_step_s: float = 0.05
    """Seconds of an optimiser step beside its arithmetic: dispatch of small kernels, DeepSpeed's hooks."""
    node_link_bytes_per_s: float = 20e9
    """Between a device and the memory of its node: the moving average takes the weights there after every step, and a
    publication goes through it."""
    publish_s: float = 0.5
    """Seconds of a publication beside the copying: the conductor's round trips and the probe."""
    prompt_share: float = 1.0
    """Mean prompt over the longest allowed."""
    response_share: float = 1.0
    """Mean response over the longest allowed."""
    longest_share: float = 1.0
    """Longest response of a batch over the longest allowed."""


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of one update by phase. Phases overlap as staleness allows; `update_s` is the whole."""

    publish_s: float
    generate_s: float
    """From the first prompt to the last token of a batch."""
    generate_steady_s: float
    """A batch's worth of work of generators that are never without any: without the wait for the longest response."""
    score_s: float
    """All processes together, on the whole batch."""
    score_tail_s: float
    """On the last chunk of a batch, when nothing is generated any more."""
    prepare_s: float
    train_s: float
    update_s: float
    learner_waits_s: float
    generators_wait_s: float

    def episodes_per_s(self, batch_size: int) -> float:
        """Episodes trained in a second."""
        return batch_size / self.update_s


def update_time(work: PpoWork, constants: Constants) -> UpdateTime:
    """The phases of an update, and the whole, at the recipe's staleness.

    At staleness 0 learner and generators take turns: publish, generate, score the last chunk, prepare, train. Otherwise
    they work at the same time, and the slowest sets the pace.
    """
    ppo = work.ppo
    prepare_s, train_s = learner_seconds(work, constants)
    publish_s = constants.publish_s + _publication_bytes(work) / constants.node_link_bytes_per_s
    generate_s, steady_s = generation_seconds(work, constants)
    score_s = scoring_seconds(work, constants)
    tail_s = score_s * ppo.chunk_size / ppo.batch_size
    learner_s = publish_s + prepare_s + train_s
    if ppo.max_staleness == 0:
        waits_s = max(generate_s, score_s) + tail_s
        update_s = learner_s + waits_s
        generators_wait_s = update_s - generate_s
    else:
        update_s = max(learner_s, steady_s, score_s)
        waits_s, generators_wait_s = update_s - learner_s, update_s - steady_s
    return UpdateTime(
        publish_s=publish_s,
        generate_s=generate_s,
        generate_steady_s=steady_s,
        score_s=score_s,
        score_tail_s=tail_s,
        prepare_s=prepare_s,
        train_s=train_s,
        update_s=update_s,
        learner_waits_s=waits_s,
        generators_wait_s=generators_wait_s,
    )


def learner_seconds(work: PpoWork, constants: Constants) -> tuple[float, float]:
    """Seconds in which a batch is prepared (values, log-probabilities) and trained."""
    rate = work.learners.workers * work.learners.devices * work.machines.learners.flops(work.learners.engine.dtype)
    prepare_s = prepare_flop(work, constants) / (constants.forward_share * rate)
    train_s = train_flop(work, constants) / (constants.train_share * rate) + train_overhead_s(work, constants)
    return prepare_s, train_s


def train_overhead_s(work: PpoWork, constants: Constants) -> float:
    """Seconds of an update's training that do not go into arithmetic: steps, and the moving average's copies."""
    steps = work.ppo.minibatches * work.ppo.inner_epochs
    averages = steps if work.ppo.ema_every == "step" else 1
    return steps * constants.optimizer_step_s + averages * 4 * work.shape.parameters / constants.node_link_bytes_per_s


def train_flop(work: PpoWork, constants: Constants) -> float:
    """FLOP of an update's training: policy, value network and pretraining term, forward and backward."""
    ppo = work.ppo
    passes = 4 if work.learners.engine.activation_checkpointing else 3
    prompt, response = lengths(work, constants)
    episode = policy_flop(work.shape, prompt, response) + scalar_flop(work.shape, prompt + response)
    if ppo.ptx_coefficient > 0:
        episode += ppo.ptx_per_episode * policy_flop(work.shape, 0, ppo.ptx_context)
    return passes * ppo.inner_epochs * ppo.batch_size * episode


def prepare_flop(work: PpoWork, constants: Constants) -> float:
    """FLOP before an update's training: values of the batch, the old policy where it is recomputed, and the comparison
    of engine and learner on the first minibatch where it is not."""
    ppo = work.ppo
    prompt, response = lengths(work, constants)
    rows = ppo.batch_size
    if ppo.old_logprobs != "recomputed":
        rows = ppo.batch_size // ppo.minibatches if ppo.max_staleness == 0 else 0
    return ppo.batch_size * scalar_flop(work.shape, prompt + response) + rows * policy_flop(
        work.shape, prompt, response
    )


def generation_seconds(work: PpoWork, constants: Constants) -> tuple[float, float]:
    """Seconds in which the generators write a batch: from nothing to the last token, and where there is always more."""
    rollouts, shape = work.rollouts, work.shape
    element = ELEMENT_BYTES[rollouts.dtype]
    prompt, response = lengths(work, constants)
    longest = max(response, constants.longest_share * work.sampling.max_response_tokens)
    episodes = -(-work.ppo.batch_size // rollouts.generators)
    ranks = rollouts.tensor_parallel
    room = sequences_that_fit(shape, rollouts.kv_cache_mib, rollouts.dtype, round(prompt + response) or 1, ranks)
    admitted = -(-work.ppo.batch_size * (work.ppo.max_staleness + 1) // rollouts.generators)
    running = max(1, min(rollouts.max_concurrent, room, admitted))
    flops = work.generator_devices * work.machines.generators.flops(rollouts.dtype)
    prefill_s = episodes * policy_flop(shape, prompt, 1) / (constants.forward_share * flops)
    read = element * shape.parameters + running * shape.key_value_bytes(element) * (prompt + response / 2)
    read_s = read / (constants.bandwidth_share * work.generator_devices * work.machines.generators.bandwidth)
    multiply_s = running * policy_flop(shape, 0, 1) / (constants.forward_share * flops)
    sums_s = 0.0 if ranks == 1 else 2 * shape.layers * constants.all_reduce_s
    step_s = max(read_s, multiply_s) + sums_s + constants.engine_step_s
    steps = longest + response * max(0.0, episodes / running - 1)
    return prefill_s + steps * step_s, prefill_s + episodes * response / running * step_s


def scoring_seconds(work: PpoWork, constants: Constants) -> float:
    """Seconds in which reward model and reference read a batch; where they are apart, of the slower."""
    prompt, response = lengths(work, constants)
    rate = constants.forward_share * work.scoring_devices * work.machines.scoring.flops(work.scoring.dtype)
    reward_s = work.ppo.batch_size * scalar_flop(work.shape, prompt + response) / rate
    reference_s = work.ppo.batch_size * policy_flop(work.shape, prompt, response) / rate
    if work.scoring.fused:
        return (reward_s + reference_s) / work.scoring.scorers
    return max(reward_s / work.scoring.scorers, reference_s / work.scoring.references)


def lengths(work: PpoWork, constants: Constants) -> tuple[float, float]:
    """Mean tokens of prompt and response."""
    return (
        constants.prompt_share * work.max_prompt_tokens,
        constants.response_share * work.sampling.max_response_tokens,
    )


def policy_flop(shape: ModelShape, prompt: float, response: float) -> float:
    """FLOP of one forward pass over a sequence, with logits for the response alone."""
    return scalar_flop(shape, prompt + response) + 2.0 * shape.unembedding_parameters * response


def scalar_flop(shape: ModelShape, tokens: float) -> float:
    """FLOP of one forward pass of the network without its logits."""
    attention = 2.0 * shape.layers * shape.heads * shape.head_size * tokens
    return (2.0 * shape.backbone_matmul_parameters + attention) * tokens


def _publication_bytes(work: PpoWork) -> float:
    """Gathered in float32, packed in the engines' dtype, put into the object store and read by each generator."""
    return work.shape.parameters * (4 + 3 * ELEMENT_BYTES[work.rollouts.dtype])
