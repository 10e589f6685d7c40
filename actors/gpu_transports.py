"""The learner's side of vLLM's own weight transports between GPUs: CUDA IPC and NCCL.

vLLM's trainer engines send; what they ask of the generators' engines (connect, begin, receive, end) they ask of a
client that is this program's publication. Generators also get the snapshot through the object store: the weight store
keeps it for those that start later, and what a GPU hands over must have the names, dtypes and shapes that it has.

Imports vllm: seconds. Only where one of these transports is chosen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from corpus.problems import RunProblem
from models.snapshot import Snapshot, unpack

Offer = dict[str, Any]
"""What an engine needs to receive weights: names, dtypes, shapes and, over IPC, a handle of each."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the learner and `engines` generators' engines of one GPU each meet for NCCL: an address of the learner's
    node and a free port there. Whoever joins or leaves makes another one necessary."""

    address: str
    port: int
    engines: int


def connections(init_info: Offer, engines: int) -> list[Offer]:
    """What each engine is connected with, in order: vLLM numbers the workers of one engine only, and every generator is
    an engine of its own, so each is told where its rank lies."""
    offset = init_info.get("rank_offset")
    if offset is None:
        return [init_info] * engines
    return [{**init_info, "rank_offset": offset + place} for place in range(engines)]


class GpuSender:
    """Sends snapshots from this process's GPU. One learner rank has one: the snapshot is whole there."""

    def __init__(
        self,
        transport: Literal["ipc", "nccl"],
        device: torch.device,
        connect: Callable[[Offer], None],
        rendezvous: Rendezvous | None = None,
        packed: bool | None = None,
    ) -> None:
        """Connects to the engines: `connect` must have every engine's `connect` called, with what `connections` makes
        of its argument, and return when all have been. `packed` sends many weights in one buffer; None is vLLM's own
        choice for the transport.

        Raises RunProblem where the engines cannot be connected, or NCCL is asked for without a rendezvous.
        """
        self._transport = transport
        self._source = _SnapshotSource(device)
        self._client = _PublicationClient(connect)
        try:
            self._sender = WeightTransferTrainerFactory.trainer_init(
                _trainer_info(transport, rendezvous, packed), client=self._client, source=self._source
            )
        except (RuntimeError, ValueError, AttributeError) as error:
            raise RunProblem(
                f"The learner could not open vLLM's {transport} weight transport to the generators: {error}",
                "publication/transport",
            ) from error

    def send(self, snapshot: Snapshot, deliver: Callable[[Offer], None]) -> None:
        """Have `deliver` bring the offer to every engine's `load`; what is offered stays until it has returned.

        Raises what `deliver` raises, and RunProblem where vLLM could not send.
        """
        self._source.snapshot, self._client.deliver = snapshot, deliver
        try:
            self._sender.send_weights()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RunProblem):
                raise
            attempt, update = snapshot.version
            raise RunProblem(
                f"The weights of attempt {attempt}, update {update} could not be sent over {self._transport}: {error}",
                "publication/transport",
            ) from error
        finally:
            self._source.snapshot = self._client.deliver = None


class _SnapshotSource(WeightSource):
    """A snapshot's weights on the learner's GPU, in the order of its manifest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.snapshot: Snapshot | None = None

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(entry.name, getattr(torch, entry.dtype), entry.shape) for entry in self._held().manifest]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in unpack(self._held()):
            yield name, weight.to(self._device)

    def _held(self) -> Snapshot:
        if self.snapshot is None:
            raise RuntimeError("There are no weights to send outside of a publication.")
        return self.snapshot


class _PublicationClient:
    """vLLM's `VLLMWeightSyncClient`, with begin, receive and end as one: an engine that has begun to take new weights
    must not step before it has them all, so its `load` does the three between two steps."""

    def __init__(self, connect: Callable[[Offer], None]) -> None:
        self._connect = connect
        self.deliver: Callable[[Offer], None] | None = None

    def init_weight_transfer_engine(self, init_info: Offer) -> None:
        self._connect(init_info)

    def start_weight_update(self) -> None:
        """Part of `load`."""

    def update_weights(self, update_info: Any) -> None:
        if self.deliver is None:
            raise RuntimeError("There is nobody to deliver weights to outside of a publication.")
        self.deliver(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Part of `load`, which also gives them their version."""


def _trainer_info(transport: str, rendezvous: Rendezvous | None, packed: bool | None) -> TrainerInitInfo:
    chosen = {} if packed is None else {"packed": packed}
    if transport == "ipc":
        return IPCTrainerInitInfo(rank=0, **chosen)
    if rendezvous is None:
        raise RunProblem(
            "NCCL needs a rendezvous: the learner's address, a free port, and the number of engines.",
            "publication/transport",
        )
    return NCCLTrainerInitInfo(
        master_address=rendezvous.address,
        master_port=rendezvous.port,
        world_size=1 + rendezvous.engines,
        rank=0,
        **chosen,
    )
