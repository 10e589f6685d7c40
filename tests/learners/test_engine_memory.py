"""What a DeepSpeed engine holds, against what cluster.memory reckons for plans and for the preflight."""

import gc
from collections.abc import Iterable

import pytest
import torch

from cluster.memory import engine_bytes
from learners.engine import Engine
from learners.engine_settings import EngineSettings
from learners.optimizer import OptimizerSettings
from models.build import tiny_llama
from models.settings import TinyLlamaSettings

SETTINGS = TinyLlamaSettings(hidden_size=192, layers=4, heads=4, mlp_size=512)

pytestmark = [
    pytest.mark.usefixtures("one_process"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),  # DeepSpeed's calls
]


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def living_tensors() -> list[torch.Tensor]:
    """All tensors that Python knows, and gradients, which it knows only where somebody has asked for them."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    return found + [each.grad for each in found if each.is_leaf and each.grad is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_holds_what_is_reckoned(stage, dtype):
    """One rank, so that nothing is divided: what lives between the backward pass and the step."""
    network = tiny_llama(SETTINGS, 300, pad_id=0, bos_id=None, eos_id=1, seed=0)
    size = sum(parameter.numel() for parameter in network.parameters())
    own = held_bytes(network.parameters())
    before = held_bytes(living_tensors()) - own
    settings = EngineSettings(zero_stage=stage, dtype=dtype)
    engine = Engine(network, settings, OptimizerSettings(peak_lr=1e-3), seed=0)
    try:
        engine.backward(engine(torch.ones((1, 8), dtype=torch.int64)).logits.float().sum())
        held = held_bytes(living_tensors()) - before
        parts = engine_bytes(size, 1, settings)
        assert held <= 1.05 * sum(parts.values())
        # Buffers may be gone by now, and ZeRO-2's float32 gradients are where Python does not see them.
        assert held >= 0.7 * (sum(parts.values()) - parts.get("communication", 0))
    finally:
        engine.close()


def test_what_forgot_the_moments_would_be_seen():
    size = 1000
    for dtype in ("float32", "bfloat16"):
        parts = engine_bytes(size, 1, EngineSettings(dtype=dtype))
        assert 1.05 * (sum(parts.values()) - parts["moments"]) < sum(parts.values()) - parts.get("communication", 0)
