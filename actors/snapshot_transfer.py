"""vLLM weight-transfer backends of a generator's engine: our own, and vLLM's between GPUs with ours beside.

Our own loads weights that are already in this process: views of one flat snapshot. It is what vLLM's NCCL and IPC
backends are, for any engine in an actor's own process: nothing is copied but from the snapshot into the parameters. CPU
linear layers are repacked after loading, so weights go in through vLLM's layerwise reload, which undoes and redoes the
repacking.

An engine whose model is divided over several devices has a process for each: they map the snapshot, check it, and each
takes its part of every tensor.

An engine has one backend, and a generator that starts in the midst of a run, or answers held-out prompts, takes its
weights from the object store whatever the transport is; so vLLM's backends are extended by ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.snapshot_files import map_snapshot
from models.snapshot import unpack, verify


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to connect to."""


@dataclass
class SnapshotUpdate(WeightTransferUpdateInfo):
    """`weights`: names and tensors as the checkpoint of the model's class has them."""

    weights: list[tuple[str, torch.Tensor]]


class SnapshotTransferEngine(WeightTransferEngine[NoInit, SnapshotUpdate]):
    """Loads tensors of this process into the model between two engine steps."""

    init_info_cls = NoInit
    update_info_cls = SnapshotUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do: there is no peer."""

    def start_weight_update(self) -> None:
        """Put the layers back into the form that checkpoints load into."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SnapshotUpdate) -> None:
        """Load the tensors. The model casts them to its own dtype."""
        _load(self, update_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its device synchronisation, which CPU builds of torch do not have."""
        _update(self, update_info)

    def finish_weight_update(self) -> None:
        """Repack the layers for this processor."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_unembedding(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


class IpcOrSnapshotEngine(IPCWeightTransferEngine):
    """vLLM's CUDA IPC: tensors of another process on the same GPU, by handle. Takes weights of this process too."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive what the learner offers, or load weights of this process."""
        _update(self, update_info)

    def finish_weight_update(self) -> None:
        """Put the layers into the form that this processor computes with."""
        super().finish_weight_update()
        _repack_tied_unembedding(self.model)


class NcclOrSnapshotEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL: tensors that the learner broadcasts to all engines at once. Takes weights of this process too."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive what the learner offers, or load weights of this process."""
        _update(self, update_info)

    def finish_weight_update(self) -> None:
        """Put the layers into the form that this processor computes with."""
        super().finish_weight_update()
        _repack_tied_unembedding(self.model)


BACKENDS: dict[str, type[WeightTransferEngine]] = {
    "object_store": SnapshotTransferEngine,
    "ipc": IpcOrSnapshotEngine,
    "nccl": NcclOrSnapshotEngine,
}
"""By transport."""


def register(transport: str) -> str:
    """Make the backend of a transport known to vLLM, once a process; returns what it is called there."""
    name = f"amenable_{transport}"
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, BACKENDS[transport])
    return name


def _update(engine: WeightTransferEngine, update_info: dict[str, Any]) -> None:
    """Weights of this process or of a snapshot that it can map, where an update has some; anything else is the
    transport's own."""
    if "snapshot" in update_info:
        snapshot = map_snapshot(Path(update_info["snapshot"]))
        verify(snapshot)  # in each process: what it maps is what was packed
        update_info = {"weights": list(unpack(snapshot))}
    if "weights" in update_info:
        _load(engine, SnapshotUpdate(**update_info))
    else:
        engine.receive_weights(engine.parse_update_info(update_info))
    _synchronise(engine.device)


def _load(engine: WeightTransferEngine, update: SnapshotUpdate) -> None:
    model: Any = engine.model
    model.load_weights(iter(update.weights))


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _repack_tied_unembedding(model: torch.nn.Module) -> None:
    """An unembedding tied to the embedding is loaded through the latter, so the reload passes it by; on CPUs it holds a
    packed copy of its own, which would go on giving the old weights' logits."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            vars(layer).pop("_already_called_process_weights_after_loading", None)
            layer.quant_method.process_weights_after_loading(layer)
