import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests share

import pytest


@pytest.fixture(scope="module")
def ray_session():
    """A local Ray session for the tests of this room that run real actors."""
    import ray

    from cluster.session import session

    with session(None, cpus=2):
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield ray


@pytest.fixture(scope="session")
def reward_export(tmp_path_factory):
    """The directory of an exported reward model of ours with random weights and a bias of 0.75."""
    from corpus.tokenising import train_bpe_tokenizer
    from models.build import TinyLlamaSettings, tiny_llama
    from models.scalar_head import ScalarHeadModel

    path = tmp_path_factory.mktemp("reward-model")
    tokenizer = train_bpe_tokenizer(["hello world, what is the capital of France"] * 5, 280, path / "tokenizer")
    settings = TinyLlamaSettings(hidden_size=32, layers=2, heads=2, mlp_size=48, context_length=128)
    llama = tiny_llama(settings, len(tokenizer), pad_id=0, bos_id=1, eos_id=2, seed=0)
    ScalarHeadModel(llama.model, seed=1).save_reward_model(path / "export", tokenizer, bias=0.75)
    return str(path / "export")


@pytest.fixture
def scorer_module(tmp_path, monkeypatch):
    """Writes code into a module of the working directory and returns the module's name."""
    monkeypatch.chdir(tmp_path)
    name = f"scorer_{tmp_path.name.replace('-', '_')}"

    def write(code):
        (tmp_path / f"{name}.py").write_text(code)
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.fixture
def no_proxy(monkeypatch):
    """Servers of this machine are asked directly."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def play(monkeypatch):
    """Runs a coroutine function of a `stand_in_cast.Cast` that is ready; who was killed is in `cast.killed`."""
    import asyncio

    from stand_in_cast import Cast

    from actors import pulse, weight_store

    killed: list = []

    def kill(handle, last_pulse) -> None:
        handle.actor.dead = True
        killed.append(handle.actor)

    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    monkeypatch.setattr(pulse, "kill", kill)

    def run(scene, deadline_s: float = 30.0, sampling_deadline_s: float = 30.0, **given) -> Cast:
        async def whole() -> Cast:
            each = await Cast(deadline_s, sampling_deadline_s, **given).begin()
            each.killed = killed
            await asyncio.wait_for(scene(each), 60)
            return each

        return asyncio.run(whole())

    return run
