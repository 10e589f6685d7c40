"""A vLLM weight-transfer backend for weights that are already in this process: views of one flat snapshot.

It is what vLLM's NCCL and IPC backends are, for a CPU engine in an actor's own process: nothing is copied but from the
snapshot into the parameters. CPU linear layers are repacked after loading, so weights go in through vLLM's layerwise
reload, which undoes and redoes the repacking.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "amenable_snapshot"


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
        model: Any = self.model
        model.load_weights(iter(update_info.weights))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its device synchronisation, which CPU builds of torch do not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """Repack the layers for this processor."""
        finalize_layerwise_reload(self.model, self.model_config)
        # An unembedding tied to the embedding is loaded through the latter, so the reload passes it by; on CPUs it
        # holds a packed copy of its own, which would go on giving the old weights' logits.
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                vars(layer).pop("_already_called_process_weights_after_loading", None)
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing to release."""


def register() -> None:
    """Make the backend known to vLLM, once a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransferEngine)
