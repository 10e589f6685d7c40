"""What a service puts into vLLM's worker processes: weights from files, and an end when the replica has died.

vLLM imports this module in the worker, by its name, before the engine is made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.owner import end_with_owner
from actors.snapshot_files import map_snapshot
from actors.snapshot_transfer import SnapshotTransferEngine
from models.snapshot import unpack

BACKEND = "amenable_files"


class FileTransferEngine(SnapshotTransferEngine):
    """Loads weights from files that this machine has: an update is `{"snapshot": path}` or `{"safetensors": [path]}`.

    Whoever sends it has checked the files.
    """

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the files' tensors into the model."""
        super().update_weights({"weights": list(_weights(update_info))})


def _weights(update_info: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    if "snapshot" in update_info:
        yield from unpack(map_snapshot(Path(update_info["snapshot"])))
        return
    from safetensors import safe_open

    for path in update_info["safetensors"]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                yield name, file.get_tensor(name)


class Extension:
    """vLLM asks for a class, whose methods a worker would gain; all there is to do is done by importing it."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
end_with_owner()
