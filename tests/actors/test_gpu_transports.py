"""vLLM's GPU transports, learner's side and engine's side, driven by the classes that drive them on GPUs. No GPU takes
part: what stands in for CUDA hands over tensors of this process.
"""

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_engine import reference_logprobs, save_model, snapshot_of

from actors.rollout_engine import Request, RolloutEngine
from actors.settings import RolloutSettings
from corpus.problems import RunProblem
from tests.toy_llama import make_llama

pytestmark = pytest.mark.slow  # vLLM's import alone takes seconds

CONTEXT = 64
CPU = torch.device("cpu")


class Gpu:
    """Stands in for CUDA: a device of this uuid, and handles that lead to tensors for as long as these are held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.weight_transfer import ipc_engine

        self.uuid = "GPU-a"
        self.shared: list[torch.Tensor] = []
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self)
        monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
        monkeypatch.setattr(ipc_engine, "reduce_tensor", self.share)
        monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda place, *_: self.shared[place])

    def share(self, tensor: torch.Tensor) -> tuple[None, tuple[int, ...]]:
        self.shared.append(tensor)
        return None, (len(self.shared) - 1, *[0] * 7)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


class Engines:
    """Takes down what the learner asks of the engines."""

    def __init__(self) -> None:
        self.connected: list[dict[str, Any]] = []
        self.offers: list[dict[str, Any]] = []


def ipc_sender(engines: Engines) -> Any:
    from actors.gpu_transports import GpuSender

    return GpuSender("ipc", CPU, engines.connected.append)


def test_ipc_connects_once_and_offers_every_publication_with_the_snapshots_names_dtypes_and_shapes(gpu):
    engines = Engines()
    sender = ipc_sender(engines)
    assert engines.connected == [{"packed": False}]
    for update in (0, 1):
        snapshot = snapshot_of(make_llama(update, CONTEXT), update)
        sender.send(snapshot, engines.offers.append)
        offer = engines.offers[update]
        assert offer["names"] == [entry.name for entry in snapshot.manifest]
        assert offer["dtype_names"] == [entry.dtype for entry in snapshot.manifest] == ["float32"] * len(offer["names"])
        assert offer["shapes"] == [list(entry.shape) for entry in snapshot.manifest]
        assert [set(handle) for handle in offer["ipc_handles"]] == [{"GPU-a"}] * len(offer["names"])
    assert len(engines.connected) == 1
    assert len(engines.offers) == 2


def test_what_delivery_raises_reaches_the_learner_and_the_next_one_is_none_the_worse(gpu):
    engines = Engines()
    sender = ipc_sender(engines)
    snapshot = snapshot_of(make_llama(0, CONTEXT), 3)

    def late(offer: dict[str, Any]) -> None:
        raise RunProblem("After 5 s these generators have yet to load weights 0.3: generator-1.", "run/unexpected")

    def broken(offer: dict[str, Any]) -> None:
        raise ValueError("invalid handle")

    with pytest.raises(RunProblem, match=r"^After 5 s .* generator-1\.$"):
        sender.send(snapshot, late)
    with pytest.raises(RunProblem, match="attempt 0, update 3 could not be sent over ipc: invalid handle"):
        sender.send(snapshot, broken)
    sender.send(snapshot, engines.offers.append)
    assert len(engines.offers) == 1


def test_an_endpoint_that_cannot_be_opened_is_a_sentence(monkeypatch):
    from actors.gpu_transports import GpuSender

    with pytest.raises(RunProblem, match="NCCL needs a rendezvous"):
        GpuSender("nccl", CPU, lambda info: None)

    def refuse(init_info: dict[str, Any]) -> None:
        raise RuntimeError("no route to host")

    Gpu(monkeypatch)
    with pytest.raises(RunProblem, match="could not open vLLM's ipc weight transport to the generators: no route"):
        GpuSender("ipc", CPU, refuse)


def made(directory: Path, transport: str) -> RolloutEngine:
    settings = RolloutSettings(max_concurrent=4, kv_cache_mib=16).model_copy(update={"transport": transport})
    return RolloutEngine(str(directory), settings, CONTEXT)


@pytest.fixture(scope="module")
def engines_by_transport(tmp_path_factory):
    directory = save_model(tmp_path_factory.mktemp("model"), CONTEXT)
    engines = {transport: made(directory, transport) for transport in ("ipc", "nccl")}
    yield engines
    for engine in engines.values():
        engine.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def error_nats(engine: RolloutEngine, seed: int) -> float:
    """How far the engine's log-probabilities are from those of transformers with the weights of `seed`."""
    [completion] = engine.run([Request("r", [5, 9, 33, 60], 12, 1.0, seed=1)])
    exact = reference_logprobs(make_llama(seed, CONTEXT), [5, 9, 33, 60], completion.tokens, 1.0)
    return float(np.abs(completion.logprobs - exact).max())


def test_an_engine_takes_what_ipc_offers_in_mid_response_and_snapshots_too(engines_by_transport, gpu):
    engine, connected = engines_by_transport["ipc"], Engines()
    sender = ipc_sender(connected)
    engine.connect(connected.connected[0])
    engine.load(snapshot_of(make_llama(0, CONTEXT), 0), "0.0")  # as one that starts later: from the weight store
    assert error_nats(engine, 0) < 5e-5
    engine.submit(Request("long", [5, 9, 33], 40, 1.0, seed=2))
    engine.step()
    snapshot = snapshot_of(make_llama(1, CONTEXT), 1)
    sender.send(snapshot, lambda offer: engine.load(snapshot, "0.1", offer))
    [completion] = [done for _ in iter(lambda: engine.pending, 0) for done in engine.step()]
    assert completion.spans[-1].version == "0.1"
    assert error_nats(engine, 1) < 5e-5
    assert error_nats(engine, 0) > 1e-2
    engine.load(snapshot_of(make_llama(2, CONTEXT), 2), "sample")  # as for held-out prompts
    assert error_nats(engine, 2) < 5e-5


def test_an_offer_that_is_not_of_the_snapshot_is_refused_before_the_engine_is_touched(engines_by_transport, gpu):
    engine, connected = engines_by_transport["ipc"], Engines()
    snapshot = snapshot_of(make_llama(0, CONTEXT), 0)
    engine.load(snapshot, "0.0")
    ipc_sender(connected).send(snapshot, connected.offers.append)
    [offer] = connected.offers
    shapes = [[7, 7], *offer["shapes"][1:]]
    lists = ("names", "dtype_names", "shapes", "ipc_handles")
    wrong = {
        "of shape": {**offer, "shapes": shapes},
        "in bfloat16": {**offer, "dtype_names": ["bfloat16", *offer["dtype_names"][1:]]},
        "another of shape": {**offer, "names": ["another", *offer["names"][1:]]},
        "its snapshot holds": {**offer, **{name: offer[name][:-1] for name in lists}},
    }
    for says, bad in wrong.items():
        with pytest.raises(RunProblem, match=says):
            engine.load(snapshot, "0.1", bad)
    assert error_nats(engine, 0) < 5e-5
    engine.load(snapshot, "0.1", offer)
    assert error_nats(engine, 0) < 5e-5


class Group:
    """Stands in for an NCCL communicator of one sender and one engine: what is broadcast is received, in order."""

    def __init__(self) -> None:
        self.sent: queue.Queue[torch.Tensor] = queue.Queue()

    def sender(self) -> Any:
        return _End(lambda tensor: self.sent.put(tensor.clone()))

    def receiver(self) -> Any:
        return _End(lambda tensor: tensor.copy_(self.sent.get(timeout=30)))


class _End:
    def __init__(self, transfer: Any) -> None:
        self._transfer = transfer

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        assert src == 0
        self._transfer(tensor)

    def destroy(self) -> None:
        pass


def test_nccl_meets_at_the_rendezvous_and_broadcasts_while_the_engine_receives(engines_by_transport, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    from actors.gpu_transports import GpuSender, Rendezvous, connections

    engine, group, joined = engines_by_transport["nccl"], Group(), []

    def join(info: Any, parallel: Any) -> Any:
        joined.append((info.master_address, info.master_port, info.rank_offset + parallel.rank, info.world_size))
        return group.receiver()

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group.sender())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    meeting = Rendezvous("10.0.0.7", 2345, engines=3)
    [first, second, third] = connections({"rank_offset": 1, "world_size": 4}, 3)
    assert [each["rank_offset"] for each in (first, second, third)] == [1, 2, 3]  # vLLM's own client gives all rank 1
    sender = GpuSender("nccl", CPU, lambda info: engine.connect(connections(info, 3)[1]), meeting, packed=False)
    assert joined == [("10.0.0.7", 2345, 2, 4)]
    engine.load(snapshot_of(make_llama(0, CONTEXT), 0), "0.0")
    assert error_nats(engine, 0) < 5e-5
    snapshot = snapshot_of(make_llama(1, CONTEXT), 1)
    sender.send(snapshot, lambda offer: engine.load(snapshot, "0.1", offer))
    assert group.sent.empty()
    assert error_nats(engine, 1) < 5e-5
