"""A DeepSpeed engine with the arithmetic of plain PyTorch: any number of losses, then one optimiser step.

What holds at every ZeRO stage, rank count and split into micro-batches (tests compare with plain torch):

- gradients are those of the sum of all losses passed to `backward` since the last `step`, over all ranks;
- the norm that `step` returns and clips by is that of this whole gradient;
- weights and Adam's moments are read and written in full, in float32, by parameter name (a wrapper's prefix taken off,
  so that the names are those of the Hugging Face model).
"""

import gc
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from corpus.problems import RunProblem
from learners.engine_settings import EngineSettings
from learners.optimizer import OptimizerSettings
from models.forward import PolicyModel, plain_names
from models.scalar_head import ScalarHeadModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
import deepspeed.runtime.bf16_optimizer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# DeepSpeed would compile a C++ kernel, for an all-reduce that training never calls, at the first engine of a process.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Nor can its bfloat16 optimiser be told not to print memory figures, each after a garbage collection of half a second.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
# DeepSpeed calls collectives by names that torch is about to rename.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_SCHEMA_VERSION = 1


class Engine:
    """One module under one optimiser. torch.distributed must be initialised (see `learners.process_group`).

    Every method but `close` is a collective where weights or gradients are sharded: all ranks call it in the same
    order. Torch's global random state is set from (`seed`, step, rank) at the start of every step, so that dropout
    masks differ between ranks and a resumed run draws what the uninterrupted one would have drawn.
    """

    module: nn.Module
    dtype: torch.dtype
    packs_rows: bool
    """Whether forward passes leave padding out, so that micro-batches may be cut by real tokens."""

    def __init__(self, module: nn.Module, engine: EngineSettings, optimizer: OptimizerSettings, seed: int) -> None:
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"an engine trains every parameter, but {frozen[0]} is frozen")
        self.dtype = getattr(torch, engine.dtype)
        self._seed = seed
        self._steps = 0
        self._world_size = dist.get_world_size()
        self._stage = 1 if engine.zero_stage == 0 and self.dtype == torch.bfloat16 else engine.zero_stage
        self._clip = optimizer.gradient_clip
        self._norm = 0.0
        # DeepSpeed makes its masters from the module after casting it: keep what the cast would round away
        exact = {}
        if self.dtype != torch.float32:
            parameters = plain_names(module, dict(module.named_parameters()))
            exact = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}
        if engine.activation_checkpointing:
            _checkpoint_activations(module)
        self.packs_rows = isinstance(module, PolicyModel | ScalarHeadModel) and module.pack_rows()
        adam = torch.optim.AdamW(
            _parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.peak_lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )
        if self._stage == 0:
            adam.register_step_pre_hook(self._measure_and_clip)
        size = sum(parameter.numel() for parameter in module.parameters())
        wrapped: tuple[Any, ...] = deepspeed.initialize(
            model=module, optimizer=adam, config=_configuration(engine, self._stage, self._clip, size)
        )
        self._deepspeed = wrapped[0]
        self._adam = adam
        self.module = self._deepspeed.module
        self._parameters = plain_names(self.module, dict(self.module.named_parameters()))
        self._create_moments()
        if exact:
            self._write_weights(exact)
        self._seed_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass. Under ZeRO-3 every rank makes the same calls in the same order."""
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`: this rank's share of a globally normalised loss, the sum over ranks being it.

        Any number of calls may precede `step`.
        """
        # DeepSpeed averages gradients over ranks; shares are to be summed.
        self._deepspeed.backward(loss * self._world_size)

    def step(self, lr: float) -> float:
        """One optimiser step at `lr`; returns the global gradient norm before clipping and zeroes the gradients.

        Raises RunProblem, on every rank and with the weights as they were, if the norm is not finite.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        norm = self._norm if self._stage == 0 else float(self._deepspeed.get_global_grad_norm())
        if not norm < float("inf"):
            raise _not_finite(self._steps)
        self._steps += 1
        self._seed_step()
        return norm

    @property
    def steps(self) -> int:
        """Optimiser steps taken, those of a loaded state included."""
        return self._steps

    def weights(self) -> dict[str, Tensor]:
        """Full float32 master weights by parameter name, on CPU, on every rank; a copy. A tied weight appears once."""
        return self._read(None)

    def state(self) -> dict[str, Any]:
        """All that continuing needs: `weights`, `exp_avg`, `exp_avg_sq` (as `weights()`), `steps`, `schema_version`."""
        state: dict[str, Any] = {moment: self._read(moment) for moment in MOMENTS}
        return {"schema_version": STATE_SCHEMA_VERSION, "steps": self._steps, "weights": self._read(None), **state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state()` returned at any ZeRO stage, dtype and rank count."""
        for key in ("weights", *MOMENTS):
            if set(state[key]) != set(self._parameters):
                different = sorted(set(state[key]) ^ set(self._parameters))
                raise RunProblem(
                    f"the {key} of a saved training state do not fit the model: {different[0]} is in one only",
                    "checkpoint/unreadable",
                )
        self._write_weights(state["weights"])
        for moment in MOMENTS:
            self._write(moment, state[moment])
        self._steps = int(state["steps"])
        for slot in self._adam.state.values():
            slot["step"].fill_(self._steps)
        self._seed_step()

    def close(self) -> None:
        """Frees weights, moments and buffers. The engine and its module are not to be used afterwards."""
        self._deepspeed.destroy()
        self._adam.state.clear()
        self._adam.param_groups.clear()
        if self._stage == 3:
            _forget(self.module)
        for name in ("_deepspeed", "_adam", "_parameters", "module"):
            delattr(self, name)
        gc.collect()  # DeepSpeed's hooks form reference cycles that hold every buffer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _seed_step(self) -> None:
        torch.manual_seed(((self._seed * 1_000_003 + self._steps) * 4099 + dist.get_rank()) % 2**63)

    def _measure_and_clip(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0: DeepSpeed has summed the gradients over ranks and leaves norm and clipping to us."""
        gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._norm = norm.item()
        if not self._norm < float("inf"):
            raise _not_finite(self._steps)
        if self._clip is not None:
            parameters = [p for group in adam.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)

    def _create_moments(self) -> None:
        """Adam's state, as Adam itself would make it at the first step, so that it can be read and written from now."""
        sharded = self._deepspeed.optimizer
        if self._stage == 0:
            flat = list(self._parameters.values())
        elif self._stage == 3:
            flat = sharded.fp32_partitioned_groups_flat
        else:
            flat = [partition for group in self._adam.param_groups for partition in group["params"]]
        for partition in flat:
            self._adam.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{moment: torch.zeros_like(partition, requires_grad=False) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            sharded._lazy_init_hp_params_optimizer_state()

    def _read(self, moment: str | None) -> dict[str, Tensor]:
        values = {}
        for name, parameter in self._parameters.items():
            if self._stage == 0:
                value = parameter.detach() if moment is None else self._adam.state[parameter][moment]
            elif moment is None:
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            assert value is not None, name
            values[name] = value.detach().to("cpu", torch.float32, copy=True)
        return values

    @torch.no_grad()
    def _write(self, moment: str | None, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            value = values[name].float()
            if self._stage == 0:
                (parameter if moment is None else self._adam.state[parameter][moment]).copy_(value)
            elif self._stage == 3:
                share = _share_of_rank(value, parameter)
                if moment is None:
                    safe_set_local_fp32_param(parameter, share)
                else:
                    safe_set_local_optimizer_state(parameter, share, moment)
            elif moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)

    @torch.no_grad()
    def _write_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the masters, then the weights that forward passes use."""
        self._write(None, weights)
        sharded = self._deepspeed.optimizer
        if self._stage in (1, 2):
            sharded.update_lp_params()
        elif self._stage == 3:
            sharded._partition_all_parameters()
            for group in range(len(sharded.fp16_groups)):
                sharded._reassign_or_swap_out_partitioned_parameters(group)
            if sharded.persistent_parameters:
                sharded.persistent_parameters[0].all_gather(sharded.persistent_parameters)


def _configuration(engine: EngineSettings, stage: int, clip: float | None, size: int) -> dict[str, Any]:
    # DeepSpeed's default is the latter; it allocates a whole bucket at a time, and wants its size to be even.
    bucket = min(size + size % 2, 500_000_000)
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: minibatches are cut by learners.batching
        "gradient_accumulation_steps": 1,
        # The boundary is `step`, whatever number of backward passes came before. Under DeepSpeed's own counting
        # ZeRO-1 and -2 keep only the last of them.
        "managed_gradient_accumulation": False,
        # DeepSpeed's default is 1.0. At stage 0 it does not tell the norm, so there `_measure_and_clip` does both.
        "gradient_clipping": 0.0 if clip is None or stage == 0 else clip,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "memory_efficient_linear": False,  # else ZeRO-3 replaces torch's linear for the whole process
            **({"overlap_comm": False} if stage < 3 else {}),  # required below stage 2 by the boundary above
        },
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest, which does not. One group where nothing decays."""
    parameters = list(module.parameters())
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _checkpoint_activations(module: nn.Module) -> None:
    """Turns on the outermost Transformers models' own checkpointing, which works per layer and while training only."""
    enable = getattr(module, "gradient_checkpointing_enable", None)
    if enable is not None:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for child in module.children():
        _checkpoint_activations(child)


def _share_of_rank(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's slice of a full tensor under ZeRO-3, which pads the flat tensor to a multiple of the rank count."""
    share = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
    padded = torch.zeros(share * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, share * dist.get_rank(), share)


def _forget(module: nn.Module) -> None:
    """Takes a module of ZeRO-3 out of a stack and a cache that DeepSpeed keeps for the life of the process."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    method = parameter_offload.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # pyright: ignore
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()  # the cache is inside a tracing decorator


def _not_finite(step: int) -> RunProblem:
    return RunProblem(
        f"the gradient norm is not finite at optimiser step {step}; the weights are those before it",
        "learners/not-finite",
    )
