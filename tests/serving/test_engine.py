"""One engine slot with vLLM: what it answers, how it takes other weights, and that it does not outlive its replica."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from corpus.problems import RunProblem
from serving.engine import EngineSlot
from serving.errors import ApiError
from serving.gateway import ROUTES, _own_scope
from serving.names import Names, Weights
from serving.settings import ServingSettings
from serving.versions import FAILED
from tests.serving.run_on_disk import CONTEXT, alive, descendants, make_llama, publish, write_run

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

SETTINGS = ServingSettings(kv_cache_mib=16, max_concurrent=32, load_deadline_s=60, worker_apart=True)
# Engines of one process are those of test_service.


class Running:
    """An engine slot on an event loop of its own thread, and a client of it."""

    def __init__(self, run: Path) -> None:
        self.run, self.names = run, Names(run)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.slot = self.do(self._made())

    async def _made(self) -> EngineSlot:
        slot = EngineSlot(0, SETTINGS, CONTEXT)
        weights = self.names.find("reference")
        assert weights is not None
        await slot.start("reference", weights, self.names.skeleton())
        return slot

    def do(self, work: Coroutine[Any, Any, Any], deadline_s: float = 240) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(deadline_s)

    def begin(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def ask(self, path: str = "/v1/completions", **body: Any) -> "Answered":
        answered = Answered()
        body = {"model": self.slot.holds, **body}
        await self.slot.handle(_own_scope({}, path), json.dumps(body).encode(), answered, body.get("n", 1), [])
        return answered

    def take(self, name: str) -> None:
        weights = self.names.find(name)
        assert weights is not None
        self.do(self.slot.take(name, weights))


class Answered:
    """What came of a request."""

    def __init__(self) -> None:
        self.status, self.headers, self.parts = 0, {}, []

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.parts.append(message.get("body", b""))

    def json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.parts))

    def chunks(self) -> list[dict[str, Any]]:
        events = b"".join(self.parts).decode().split("\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in events if event and "[DONE]" not in event]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = write_run(tmp_path_factory.mktemp("run"))
    running = Running(run)
    yield running
    running.slot.close()


def prompt_logprobs(seed: int, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = make_llama(seed)(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


TOKENS = [5, 9, 33, 60, 12, 7, 41]


def served_logprobs(running: Running) -> list[float]:
    body = running.do(running.ask(prompt=TOKENS, echo=True, max_tokens=0, logprobs=1)).json()
    return body["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_weights_of_other_models_are_what_transformers_says_they_are(running):
    """Exports and snapshots, there and back: no key or value of former weights is read."""
    publish(running.run, 1, seed=21)
    for name, seed in (("reference", 12), ("sft", 11), ("policy", 21), ("base", 10), ("reference", 12)):
        running.take(name)
        np.testing.assert_allclose(served_logprobs(running), prompt_logprobs(seed, TOKENS), atol=1e-4, err_msg=name)
        with pytest.raises(AssertionError):  # the check would see other weights
            np.testing.assert_allclose(served_logprobs(running), prompt_logprobs(seed + 40, TOKENS), atol=1e-4)


def test_a_response_says_which_weights_wrote_which_tokens(running):
    """Weights go in while responses are under way; which of them meet it is a matter of moments, so it is done until
    some have."""
    publish(running.run, 2, seed=22)
    publish(running.run, 3, seed=23)
    old, new = running.names.find("policy@2"), running.names.find("policy@3")
    running.take("policy")
    mixed, turn = 0, 0
    while not mixed:
        assert turn < 20, "the weights came too late or too early to be seen within a response, 20 times"
        old, new, turn = new, old, turn + 1
        asking = [
            running.ask(prompt=[5, 6, 7 + i], max_tokens=50, ignore_eos=True, logprobs=0, temperature=1.0, seed=i)
            for i in range(8)
        ]
        begun = [running.begin(each) for each in asking]
        deadline = time.monotonic() + 30
        while not running.slot._engine.get_num_unfinished_requests():
            assert time.monotonic() < deadline, "no request reached the engine"
            time.sleep(0.001)
        running.do(running.slot.take("policy", new))
        for each in begun:
            body = each.result(120).json()
            spans = body["amenable"]["versions"]
            versions = [span["version"] for span in spans]
            assert (spans[0]["start"], spans[-1]["end"]) == (0, body["usage"]["completion_tokens"])
            assert versions in ([old.version], [old.version, new.version], [new.version])
            mixed += len(spans) > 1
    running.do(running.slot.take("policy", running.names.find("policy@3")))
    assert running.do(running.ask(prompt=[5], max_tokens=3)).headers[b"x-amenable-version"] == b"0.3"


def test_the_last_chunk_of_a_stream_tells_the_versions_of_every_choice(running):
    running.take("policy")
    chunks = running.do(running.ask(prompt=[[5], [6]], n=2, max_tokens=4, ignore_eos=True, stream=True)).chunks()
    assert all("amenable" not in chunk for chunk in chunks[:-1])
    spans = chunks[-1]["amenable"]["versions"]
    assert [(span["index"], span["start"], span["end"]) for span in spans] == [(i, 0, 4) for i in range(4)]


def test_a_chat_tells_its_versions_too(running):
    running.take("sft")
    chat = running.do(running.ask("/v1/chat/completions", messages=[{"role": "user", "content": "w5"}], max_tokens=3))
    assert chat.status == 200
    [span] = chat.json()["amenable"]["versions"]
    assert span["version"] == running.slot.version


def test_another_model_is_not_put_in_before_requests_have_ended(running):
    running.take("sft")
    begun = running.begin(running.ask(prompt=[5], max_tokens=60, ignore_eos=True))
    time.sleep(0.05)
    running.take("reference")
    assert begun.done()
    [span] = begun.result(1).json()["amenable"]["versions"]
    assert span["version"].startswith("epoch-01")


def test_a_client_who_leaves_is_taken_out_of_the_engine(running):
    begun = running.begin(running.ask(prompt=[5], max_tokens=60, ignore_eos=True))
    deadline = time.monotonic() + 30
    while not running.slot._engine.get_num_unfinished_requests():
        assert time.monotonic() < deadline, "the request did not reach the engine"
        time.sleep(0.001)
    begun.cancel()
    while running.slot.in_flight or running.slot._engine.get_num_unfinished_requests():
        assert time.monotonic() < deadline, "the request is still in the engine"
        time.sleep(0.01)


def test_responses_beyond_what_the_engine_works_on_at_once_are_queued(running):
    from serving.metrics import Metrics

    metrics = Metrics()

    def told() -> float:
        metrics.slots([running.slot])
        [value] = re.findall(r"^amenable_responses_queued (\S+)", metrics.exposition().decode(), re.M)
        return float(value)

    assert told() == 0
    begun = running.begin(running.ask(prompt=[[5], [6], [7], [8], [9], [10]], n=8, max_tokens=60, ignore_eos=True))
    most, deadline = 0.0, time.monotonic() + 60
    while not begun.done():
        assert time.monotonic() < deadline, "the request did not end"
        most = max(most, told())
        time.sleep(0.001)
    assert begun.result(1).status == 200
    assert 0 < most <= 6 * 8 - SETTINGS.max_concurrent
    assert told() == 0


def test_damaged_and_misfitting_weights_are_refused_and_the_former_ones_stay(running):
    running.take("sft")
    publish(running.run, 4, seed=24)
    weights = running.names.find("policy")
    assert weights is not None
    content = bytearray(weights.files()[0].read_bytes())
    content[-1] ^= 1
    weights.files()[0].write_bytes(content)
    with pytest.raises(RunProblem, match="damaged"):
        running.do(running.slot.take("policy", weights))
    assert running.slot.holds == "sft"
    np.testing.assert_allclose(served_logprobs(running), prompt_logprobs(11, TOKENS), atol=1e-4)


def test_a_swap_under_load_loses_nothing(running):
    """How long it stands still is measured in bench/serve.py."""
    running.do(running.slot.take("policy", running.names.find("policy@3")))

    async def client(number: int) -> list[str]:
        versions = []
        for turn in range(6):
            answered = await running.ask(prompt=[5 + number, 7], max_tokens=12, ignore_eos=True, seed=turn)
            assert answered.status == 200
            body = answered.json()
            assert body["usage"]["completion_tokens"] == 12
            versions += [span["version"] for span in body["amenable"]["versions"]]
        return versions

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(client(number) for number in range(16)))

    begun = running.begin(all_of_them())
    one, other = running.names.find("policy@2"), running.names.find("policy@3")
    assert one is not None
    assert other is not None
    for weights in (one, other, one, other):
        running.do(running.slot.take("policy", weights))
    seen = {version for versions in begun.result(120) for version in versions}
    assert seen == {"0.2", "0.3"}
    assert running.slot.in_flight == 0


VLLM_ROUTES = {
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
}


def test_of_the_routes_of_vllm_only_listed_ones_are_let_through(running):
    """A route that a new vLLM brings is not let through, because the gateway lists what is; this tells of it."""
    found = {getattr(route, "path", "") for route in running.slot.app.routes}
    assert found >= VLLM_ROUTES
    listed = {path for _, path in ROUTES}
    # /metrics of the list is the gateway's own; vLLM's has every engine statistic.
    assert found & listed - {"/metrics"} == VLLM_ROUTES
    assert listed - found == {"/healthz", "/v1/score"}


def test_the_heart_beats_while_the_engine_works_and_not_while_it_hangs(running):
    running.slot.check(5)
    children = descendants(os.getpid())
    cores = [pid for pid in children if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert cores, "the engine's process was not found by its name"
    for pid in cores:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(3)
        with pytest.raises(RunProblem, match="has not answered"):
            running.slot.check(2)
    finally:
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while time.monotonic() - running.slot.beat_at > 2:
        assert time.monotonic() < deadline, "the heart does not beat again"
        time.sleep(0.1)


@pytest.mark.parametrize("hangs", [False, True])
def test_an_engine_is_ready_once_it_has_generated_a_token(hangs, monkeypatch, tmp_path):
    asked: list[int | None] = []

    class Engine:
        errored = False

        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
            asked.append(params.max_tokens)
            if hangs:
                await asyncio.sleep(60)
            yield None

        async def update_weight_version(self, version: str) -> None:
            """It is told."""

        async def get_weight_version(self) -> str:
            return "1"

    async def play() -> None:
        slot: Any = EngineSlot(0, ServingSettings(start_deadline_s=0.5), CONTEXT)

        async def make(directory: Path) -> None:
            slot._engine = Engine()

        monkeypatch.setattr(slot, "_make", make)
        monkeypatch.setattr(slot, "_now_holds", lambda name, version: None)
        await slot.start("sft", Weights("1", tmp_path), tmp_path)
        slot._heart.cancel()

    if hangs:
        with pytest.raises(RunProblem, match="generated no token"):
            asyncio.run(play())
    else:
        asyncio.run(play())
    assert asked == [1]


def test_what_vllm_says_of_an_engine_that_has_died_is_not_sent():
    """vLLM's own handlers before an engine that is a stand-in: an answer, and an event of a stream."""
    from fastapi import FastAPI
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.v1.engine.exceptions import EngineDeadError

    slot, app = EngineSlot(0, SETTINGS, CONTEXT), FastAPI()
    engine = SimpleNamespace(errored=False, is_running=True)
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.server, app.state.engine_client = SimpleNamespace(should_exit=False), engine
    slot._app, slot._engine = app, engine
    dies = True

    @app.post("/v1/completions")
    async def completions() -> None:
        engine.errored, engine.is_running = dies, not dies
        raise EngineDeadError

    def ask(answered: Answered) -> None:
        asyncio.run(slot.handle(_own_scope({}, "/v1/completions"), b"{}", answered, 1, []))

    answered = Answered()
    with pytest.raises(ApiError) as caught:
        ask(answered)
    assert (caught.value.code, answered.status) == ("engine_lost", 0)
    engine.errored, dies = False, False
    ask(answered)
    assert answered.status == 500  # what is kept back above
    serving: Any = SimpleNamespace(create_error_response=create_error_response)
    event = GenerateBaseServing.create_streaming_error_response(serving, EngineDeadError())
    assert f"data: {event}".encode().startswith(FAILED)


ORPHAN = """
import asyncio, sys, time
from pathlib import Path
from serving.engine import EngineSlot
from serving.names import Names, Weights
from serving.settings import ServingSettings

async def main():
    names = Names(Path(sys.argv[1]))
    slot = EngineSlot(0, ServingSettings(kv_cache_mib=16, worker_apart=sys.argv[3] == "True"), int(sys.argv[2]))
    await slot.start("sft", names.find("sft"), names.skeleton())
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("worker_apart", [True, False])
def test_an_engine_does_not_outlive_a_replica_that_is_killed(worker_apart, tmp_path):
    run = write_run(tmp_path / "run")
    script = tmp_path / "replica.py"
    script.write_text(ORPHAN)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(run), str(CONTEXT), str(worker_apart)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    engine = [
        pid for pid in descendants(process.pid) if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(engine) == 1 + worker_apart  # vLLM's loop, and its worker
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while left := [pid for pid in engine if alive(pid)]:
        assert time.monotonic() < deadline, f"{left} of {engine} have outlived their replica"
        time.sleep(0.2)
