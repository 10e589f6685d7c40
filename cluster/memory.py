"""How much memory each role needs: weights, gradients, moments by ZeRO stage, keys and values, activations.

Pure arithmetic over a model's shape and a recipe's slices; all amounts are bytes of one process. What it rests on:

- ZeRO: Rajbhandari et al. 2020, section 3, with what this program asks of DeepSpeed: masters, gradient sums and moments
  in float32. Stage 0 in bfloat16 runs as stage 1.
- Activations: Korthikanti et al. 2022, section 4, counted for a gated MLP and for attention that keeps no scores.
- Keys and values: 2 · layers · key-value heads · head size numbers a token (vLLM's paged attention, Kwon et al. 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from actors.settings import RolloutSettings, ScoringSettings
from learners.engine_settings import EngineSettings
from models.shape import ModelShape

Dtype = Literal["float32", "bfloat16"]
Device = Literal["gpu", "cpu"]

ELEMENT_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}

GIB = 1 << 30
MIB = 1 << 20

PREFILL_TOKENS = 4096
"""Prompt tokens of one step of an engine, as `actors.rollout_engine` sets it."""

RUNTIME_BYTES: dict[Device, dict[str, int]] = {
    "gpu": {"learner": GIB, "generator": GIB, "scoring": GIB},
    "cpu": {"learner": 900 * MIB, "generator": 1400 * MIB, "scoring": 650 * MIB},
}
"""What a process takes before any weight: libraries, on a GPU the CUDA context and NCCL's buffers. On CPUs measured
with the demo's network of 0.35M parameters (peaks of 0.91, 1.39 and 0.66 GiB); on GPUs an assumption, not measured."""

DEEPSPEED_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time at most (its default), or all of a smaller model."""

ZERO3_LIVE = 1_000_000_000
"""Weights that ZeRO-3 holds whole at a time at most: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that one process of a role needs on its device, by what they are for, and in the memory of its node.

    On a CPU the device is the node's memory, and `node_bytes` is 0: all of it is among the parts.
    """

    role: str
    parts: Mapping[str, int]
    node_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def with_node(self) -> "RoleMemory":
        """The same for a process without a device of its own."""
        return RoleMemory(self.role, {**self.parts, "copies on the CPU": self.node_bytes}, 0)


def engine_bytes(parameters: int, workers: int, engine: EngineSettings) -> dict[str, int]:
    """What one rank of `workers` holds of a model of `parameters` weights under DeepSpeed, by what it is."""
    element = ELEMENT_BYTES[engine.dtype]
    stage = 1 if engine.zero_stage == 0 and engine.dtype == "bfloat16" else engine.zero_stage
    share = -(-parameters // workers)
    whole = {"weights": element * parameters, "gradients": 4 * parameters, "moments": 8 * parameters}
    if stage == 0:
        return whole
    # Masters of float32 weights are the weights themselves, but for ZeRO-3, which keeps both.
    masters = 0 if engine.dtype == "float32" and stage < 3 else 4 * share
    sharded = {"weights": whole["weights"], "masters": masters, "moments": 8 * share}
    bucket = min(parameters, DEEPSPEED_BUCKET) * element
    if stage == 1:
        # The backward pass leaves gradients in the dtype of compute beside the float32 sums of all of them.
        return sharded | {"gradients": 4 * parameters, "communication": element * parameters + bucket}
    if stage == 2:
        return sharded | {"gradients": 4 * share, "communication": element * parameters + bucket}
    gathered = min(parameters, ZERO3_LIVE) * element
    return sharded | {"weights": element * share, "gradients": 4 * share, "communication": gathered + bucket}


def activation_bytes(shape: ModelShape, tokens: int, engine: EngineSettings, logits: bool) -> int:
    """What one micro-batch of `tokens` keeps for its backward pass, with `logits` those of all its tokens."""
    element = ELEMENT_BYTES[engine.dtype]
    queries = shape.heads * shape.head_size
    keys = shape.key_value_heads * shape.head_size
    # Saved by a layer: inputs and outputs of both norms, queries and keys before and after rotation, values, what
    # attention gives, gate, up, their activation and product; and both norms' inputs and outputs in float32.
    layer = element * (4 * shape.hidden_size + 3 * queries + 3 * keys + 4 * shape.mlp_size) + 16 * shape.hidden_size
    if engine.activation_checkpointing:
        kept = shape.layers * element * shape.hidden_size + layer
    else:
        kept = shape.layers * layer
    # In the dtype of compute, in float32, divided by the temperature, and normalised.
    return tokens * (kept + (shape.vocab_size * (element + 12) if logits else 0))


def learner_memory(shape: ModelShape, workers: int, engine: EngineSettings, device: Device) -> RoleMemory:
    """One rank while PPO trains, its largest stage: policy and value network, each under an engine of its own.

    In the node's memory every rank keeps the moving average of the policy in float32, takes a copy of the weights for
    it after a step, and for a checkpoint gathers weights and moments of both networks; rank 0 packs the weights it
    publishes.
    """
    parts: dict[str, int] = {}
    for parameters in (shape.parameters, shape.scalar_parameters):
        for name, amount in engine_bytes(parameters, workers, engine).items():
            parts[name] = parts.get(name, 0) + amount
    if device == "gpu":
        # torch.optim's multi-tensor step, its default on CUDA, takes about one more copy of what it steps on.
        largest = max(shape.parameters, shape.scalar_parameters)
        stepped = largest if engine.zero_stage == 0 and engine.dtype == "float32" else -(-largest // workers)
        parts["optimiser step"] = 4 * stepped
    parts["activations"] = activation_bytes(shape, engine.tokens_per_microbatch, engine, logits=True)
    parts["runtime"] = RUNTIME_BYTES[device]["learner"]
    node = 2 * 4 * shape.parameters + 12 * (shape.parameters + shape.scalar_parameters) + 4 * shape.parameters
    found = RoleMemory("learner", parts, node)
    return found if device == "gpu" else found.with_node()


def generator_memory(
    shape: ModelShape, rollouts: RolloutSettings, max_sequence_tokens: int, device: Device
) -> RoleMemory:
    """One generator: a vLLM engine with the policy's weights. A snapshot of them passes through the node's memory.

    With tensor parallelism the parts are those of one GPU, without GPUs those of all the engine's processes together;
    and the node's memory has the snapshot twice, in the object store and where these processes map it.
    """
    ranks, cache, rows = rollouts.tensor_parallel, rollouts.kv_cache_mib, rollouts.max_concurrent
    return _vllm_memory("generator", shape, rollouts.dtype, cache, rows, max_sequence_tokens, device, ranks)


def serving_memory(
    shape: ModelShape, dtype: Dtype, kv_cache_mib: int, max_concurrent: int, max_sequence_tokens: int, device: Device
) -> RoleMemory:
    """One engine of a service."""
    return _vllm_memory("serving", shape, dtype, kv_cache_mib, max_concurrent, max_sequence_tokens, device)


def _vllm_memory(
    role: str,
    shape: ModelShape,
    dtype: Dtype,
    kv_cache_mib: int,
    max_concurrent: int,
    max_sequence_tokens: int,
    device: Device,
    ranks: int = 1,
) -> RoleMemory:
    element = ELEMENT_BYTES[dtype]
    prefill = max(PREFILL_TOKENS, max_sequence_tokens)
    hidden = prefill * element * (4 * shape.hidden_size + 2 * shape.mlp_size // ranks)
    sampler = max_concurrent * shape.vocab_size * 12
    parts = {
        "weights": element * -(-shape.parameters // ranks),
        "keys and values": kv_cache_mib * MIB // ranks,
        "activations": hidden + sampler,
        "runtime": RUNTIME_BYTES[device]["generator"],
    }
    node_bytes = (1 if ranks == 1 else 2) * element * shape.parameters
    if device == "gpu":
        return RoleMemory(role, parts, node_bytes)
    if ranks > 1:
        parts = {name: ranks * amount for name, amount in parts.items()}
        parts["runtime"] += RUNTIME_BYTES[device]["generator"]  # of the process that schedules
    return RoleMemory(role, parts, node_bytes).with_node()


def scoring_memory(
    shape: ModelShape,
    scoring: ScoringSettings,
    max_prompt_tokens: int,
    max_response_tokens: int,
    device: Device,
    hosts: frozenset[Literal["reward", "reference"]],
) -> RoleMemory:
    """One scoring process that hosts the reward model, the reference or, where they are fused, both.

    The reward model is reckoned to have the policy's backbone, as the run's own has.
    """
    element = ELEMENT_BYTES[scoring.dtype]
    rows = scoring.rows_per_batch
    tokens = rows * (max_prompt_tokens + max_response_tokens)
    weights = element * (
        (shape.scalar_parameters if "reward" in hosts else 0) + (shape.parameters if "reference" in hosts else 0)
    )
    # Of responses alone: in the dtype of compute, in float32, and normalised.
    logits = rows * max_response_tokens * shape.vocab_size * (element + 8) if "reference" in hosts else 0
    parts = {
        "weights": weights,
        "activations": tokens * element * (4 * shape.hidden_size + 4 * shape.mlp_size) + logits,
        "runtime": RUNTIME_BYTES[device]["scoring"],
    }
    name = "scoring" if len(hosts) == 2 else next(iter(hosts))
    return RoleMemory(name, parts, 0)


def sequences_that_fit(
    shape: ModelShape, kv_cache_mib: int, dtype: Dtype, max_sequence_tokens: int, ranks: int = 1
) -> int:
    """Sequences of full length whose keys and values an engine holds at once; further ones wait, or are recomputed.

    Divided over more `ranks` than there are key-value heads, each head is held more than once.
    """
    copies = max(1, ranks // shape.key_value_heads)
    one = copies * shape.key_value_bytes(ELEMENT_BYTES[dtype]) * max_sequence_tokens
    return kv_cache_mib * MIB // one
