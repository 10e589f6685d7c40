"""The command `amenable serve` with everything in it: Ray Serve, vLLM, tokens, and OpenAI's own client."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from openai import APIStatusError
from typer.testing import CliRunner

from amenable.cli import app
from tests.serving.run_on_disk import CONTEXT, alive, descendants, make_llama, publish
from tests.serving.served import Service, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

TOKENS = [5, 9, 33, 60, 12, 7, 41]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = {"concurrent": 64, "body_bytes": 1 << 16}
    directory = tmp_path_factory.mktemp("service")
    with serving(directory, "0.0.0.0", memory_budget_gib=5.0, engine_gib=2.5, limits=limits) as service:
        yield service


def prompt_logprobs(seed: int, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = make_llama(seed)(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def echoed(service: Service, model: str) -> list[float]:
    found = service.client().completions.create(model=model, prompt=TOKENS, echo=True, max_tokens=1, logprobs=1)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    return logprobs.token_logprobs[1:-1]  # pyright: ignore[reportReturnType]


def test_openais_client_lists_the_models(service):
    models = {model.id: model.model_dump()["amenable"] for model in service.client().models.list()}
    assert {"policy", "sft", "reference", "base", "policy@1"} <= set(models)
    assert models["policy"] == {"title": "the policy as it is now", "version": "0.1", "loaded": True}
    assert not models["base"]["loaded"]


def test_log_probs_of_a_prompt_are_those_of_transformers_for_every_model(service):
    """Two engines for four models: those that are not loaded are put in, while the client comes again as it is told."""
    for model, seed in (("policy", 21), ("sft", 11), ("reference", 12), ("base", 10), ("policy", 21)):
        np.testing.assert_allclose(echoed(service, model), prompt_logprobs(seed, TOKENS), atol=1e-4, err_msg=model)


def test_texts_and_token_ids_are_the_same_prompt(service):
    client = service.client()
    text = client.completions.create(model="policy", prompt="w5 w9 w33", max_tokens=8, temperature=0)
    tokens = client.completions.create(model="policy", prompt=[5, 9, 33], max_tokens=8, temperature=0)
    assert text.choices[0].text == tokens.choices[0].text
    assert text.model_dump()["amenable"]["versions"][0]["version"] == "0.1"
    status, _, body = service.ask("POST", "/tokenize", {"model": "policy", "prompt": "w5 w9 w33"})
    assert (status, json.loads(body)["tokens"]) == (200, [5, 9, 33])
    status, _, body = service.ask("POST", "/detokenize", {"model": "policy", "tokens": [5, 9, 33]})
    assert (status, json.loads(body)["prompt"]) == (200, "w5 w9 w33")


def test_streams_give_the_same_tokens_and_their_versions_last(service):
    client = service.client()
    asked: dict[str, Any] = {"model": "policy", "prompt": [5, 9], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, extra_body={"ignore_eos": True})
    chunks = list(client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}))
    assert 2 < len(chunks) <= 12  # vLLM joins tokens that wait to be sent
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.model_dump().get("amenable") is not None for chunk in chunks][-2:] == [False, True]
    assert chunks[-1].model_dump()["amenable"]["versions"] == [{"index": 0, "version": "0.1", "start": 0, "end": 12}]


def test_a_stream_comes_as_it_is_written(service):
    """Not all at once at the end: the first chunk is there long before the last."""
    arrivals = []
    asked: dict[str, Any] = {"model": "policy", "prompt": [5, 9], "max_tokens": 24, "stream": True}
    for _ in service.client().completions.create(**asked, extra_body={"ignore_eos": True}):
        arrivals.append(time.perf_counter())
    assert arrivals[-1] - arrivals[0] > 10 * min(np.diff(arrivals).mean(), 0.001)
    assert np.sum(np.diff(arrivals) > 1e-4) > 4


def test_chats_too(service):
    client = service.client()
    messages: Any = [{"role": "user", "content": "w5 w9"}]
    whole = client.chat.completions.create(
        model="policy", messages=messages, max_tokens=6, temperature=0, logprobs=True
    )
    assert whole.model_dump()["amenable"]["versions"][0]["end"] == whole.usage.completion_tokens  # pyright: ignore
    chunks = list(
        client.chat.completions.create(model="policy", messages=messages, max_tokens=6, temperature=0, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].model_dump()["amenable"]["versions"]


def test_the_header_names_the_version_and_nothing_is_open_to_other_sites(service):
    status, headers, _ = service.ask(
        "POST", "/v1/completions", {"prompt": "w5", "max_tokens": 1}, Origin="http://evil.example"
    )
    assert (status, headers["x-amenable-version"]) == (200, "0.1")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["x-content-type-options"] == "nosniff"


def test_scores_are_the_reward_models(service):
    from actors.rewards import RewardSettings, make_reward
    from models.build import load_tokenizer

    tokenizer = load_tokenizer(str(service.run / "data" / "tokenizer"))
    reward = make_reward(RewardSettings(), str(service.run / "round-01" / "rm" / "export"), tokenizer, 32)
    from corpus.templates import encode_prompts, encode_responses

    prompts, responses = ["w5 w6", "w7"], ["w8 w9", "w10"]
    expected = reward.score([], [], encode_prompts(tokenizer, prompts), encode_responses(tokenizer, responses))
    pairs = [{"prompt": prompt, "response": response} for prompt, response in zip(prompts, responses, strict=True)]
    status, _, body = service.ask("POST", "/v1/score", {"model": "rm", "pairs": pairs})
    assert status == 200
    np.testing.assert_allclose(json.loads(body)["scores"], expected, rtol=1e-5)
    lists = [{"prompt": prompts[0], "responses": [responses[0], responses[1]]}]
    ranked = json.loads(service.ask("POST", "/v1/score", {"lists": lists})[2])["scores"]
    np.testing.assert_allclose(ranked[0][0], expected[0], rtol=1e-5)
    cut = [{"prompt": prompts[0], "response": responses[0], "finished": False}]
    assert json.loads(service.ask("POST", "/v1/score", {"pairs": cut})[2])["scores"][0] != pytest.approx(expected[0])


def test_scopes_and_wrong_tokens(service):
    for scope, path, body in (
        ("read", "/v1/completions", {"prompt": "w5", "max_tokens": 1}),
        ("score", "/v1/score", {"pairs": [{"prompt": "w5", "response": "w6"}]}),
    ):
        for each, token in service.tokens.items():
            assert service.ask("POST", path, body, token)[0] == (200 if each == scope else 403)
        assert service.ask("POST", path, body, "amn_000000000000_" + "a" * 43)[0] == 401


def test_a_model_that_is_not_loaded_says_when_to_come_again(service):
    loaded = {model.id for model in service.client().models.list() if model.model_dump()["amenable"]["loaded"]}
    [other, *_] = sorted({"sft", "reference", "base"} - loaded)
    status, headers, body = service.ask("POST", "/v1/completions", {"model": other, "prompt": "w5", "max_tokens": 1})
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "model_loading"
    with pytest.raises(APIStatusError) as caught:
        service.client(0).completions.create(model="policy@99", prompt="w5")
    assert caught.value.status_code == 404


class Clients:
    """Clients that ask one after another until they are told to stop, and what came of it."""

    def __init__(self, service: Service, count: int, model: str = "policy", retries: int = 0) -> None:
        self.versions: list[str] = []
        self.errors: list[str] = []
        self.spans: list[int] = []
        self.seconds: list[float] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._running = [self._pool.submit(self._run, service, model, retries, number) for number in range(count)]

    def _run(self, service: Service, model: str, retries: int, number: int) -> None:
        client, turn = service.client(retries), 0
        while not self._over.is_set():
            began = time.perf_counter()
            try:
                found = client.completions.create(
                    model=model, prompt=[5 + number, 6], max_tokens=20, seed=turn, extra_body={"ignore_eos": True}
                )
                assert found.usage is not None
                assert found.usage.completion_tokens == 20
                spans = found.model_dump()["amenable"]["versions"]
                assert (spans[0]["start"], spans[-1]["end"]) == (0, 20)
                self.versions += [span["version"] for span in spans]
                self.spans.append(len(spans))
                self.seconds.append(time.perf_counter() - began)
            except Exception as error:  # noqa: BLE001 - what a client meets is what is tested
                self.errors.append(repr(error))
                time.sleep(0.05)
            turn += 1

    def stop(self) -> None:
        self._over.set()
        for each in self._running:
            each.result(120)


def test_new_weights_are_followed_under_load_and_no_request_is_lost(service):
    clients = Clients(service, 12)
    for update, seed in ((2, 22), (3, 23), (4, 24)):
        time.sleep(1.0)
        publish(service.run, update, seed)
        until(lambda update=update: service.serves("policy") == f"0.{update}", f"version 0.{update} in the engine", 30)
    clients.stop()
    assert clients.errors == []
    assert {"0.1", "0.2", "0.3", "0.4"} <= set(clients.versions)
    assert max(clients.spans) >= 2, "no response was written by two versions: nothing went on over a change of weights"
    np.testing.assert_allclose(echoed(service, "policy"), prompt_logprobs(24, TOKENS), atol=1e-4)


def test_one_version_is_served_by_its_name_and_never_mixed(service):
    clients = Clients(service, 4, "policy@3", retries=20)
    until(lambda: clients.versions, "the first response of policy@3")
    publish(service.run, 5, seed=25)
    until(lambda: service.serves("policy") in ("0.5", None), "the newest weights beside it", 30)
    time.sleep(0.5)
    clients.stop()
    assert (clients.errors, set(clients.versions)) == ([], {"0.3"})
    np.testing.assert_allclose(echoed(service, "policy@3"), prompt_logprobs(23, TOKENS), atol=1e-4)


def test_pinning_rolls_back_and_lets_go(service):
    echoed(service, "policy")
    answer = CliRunner().invoke(app, ["pin", str(service.run), "policy@4"])
    assert answer.exit_code == 0, answer.output
    until(lambda: service.serves("policy") == "0.4", "the pinned version", 30)
    np.testing.assert_allclose(echoed(service, "policy"), prompt_logprobs(24, TOKENS), atol=1e-4)
    publish(service.run, 6, seed=26)
    time.sleep(1.0)
    assert service.serves("policy") == "0.4"
    assert "Wanted as policy: policy@4, by " in CliRunner().invoke(app, ["pin", str(service.run)]).output
    assert CliRunner().invoke(app, ["pin", str(service.run), "policy@77"]).exit_code == 2
    assert CliRunner().invoke(app, ["pin", str(service.run), "newest"]).exit_code == 0
    until(lambda: service.serves("policy") == "0.6", "the newest version", 30)


def test_the_page_is_there_and_its_login_opens_the_api_to_a_browser(service):
    status, headers, body = service.ask("GET", "/")
    assert status == 200
    assert "script-src 'self'" in headers["content-security-policy"]
    assert b"<html" in body.lower()
    _, headers, body = service.ask("POST", "/page/login", {"token": service.token})
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    csrf = json.loads(body)["visitor"]["csrf"]
    session = {"Cookie": cookie.partition(";")[0], "Authorization": ""}
    asked = {"prompt": "w5", "max_tokens": 1}
    assert service.ask("POST", "/v1/completions", asked, **session)[0] == 403
    assert service.ask("POST", "/v1/completions", asked, **session, **{"x-csrf-token": csrf})[0] == 200
    status, _, body = service.ask("GET", "/page/models", **session)
    assert status == 200
    assert json.loads(body)["limits"] == {"max_tokens": 24, "prompt_tokens": CONTEXT - 1}


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    return {(each.laddr.ip, each.laddr.port) for each in process.net_connections("inet") if each.status == "LISTEN"}


def test_haproxy_alone_listens_beyond_this_machine(service):
    below = [psutil.Process(pid) for pid in descendants(service.process.pid)]
    proxies = [each for each in below if "haproxy.cfg" in " ".join(each.cmdline())]
    assert {port for each in proxies for port in listening(each)} == {("0.0.0.0", service.port)}
    found = [(each, *place) for each in below if each not in proxies and each.is_running() for place in listening(each)]
    with ThreadPoolExecutor(64) as pool:  # most of these ports are no HTTP's, and say nothing until the deadline
        answers = list(pool.map(service.answers_http, [port for _, _, port in found]))
    answering = [(each.name(), host) for (each, host, _), answer in zip(found, answers, strict=True) if answer]
    assert {host for _, host in answering} == {"127.0.0.1"}, answering
    assert len(answering) == 2, f"the replica and the proxy that waits for one are expected, not {answering}"


def test_a_client_that_leaves_has_its_request_ended(service):
    """And no other is: a client that leaves is counted as 499."""

    def left() -> float:
        text = service.ask("GET", "/metrics")[2].decode()
        return sum(float(value) for value in re.findall(r'amenable_requests_total{.*status="499"} (\S+)', text))

    before = left()
    body = json.dumps({"prompt": [5], "max_tokens": 24, "n": 8, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {service.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def leave() -> bool:
        with socket.create_connection(("127.0.0.1", service.port), 10) as client:
            client.sendall(head.encode() + body)
            time.sleep(0.02)
        return left() > before

    until(leave, "a request whose client has left", 60)
    until(lambda: "amenable_requests_in_flight 0.0" in service.ask("GET", "/metrics")[2].decode(), "its end", 30)


def test_metrics_tell_what_is_served(service):
    echoed(service, "policy")
    text = until(
        lambda: (text := service.ask("GET", "/metrics")[2].decode()) and 'model="policy",slot' in text and text,
        "metrics",
    )
    assert "amenable_request_seconds_bucket" in text
    assert 'amenable_generated_tokens_total{model="policy"}' in text


def test_a_replica_that_is_killed_comes_back_with_the_newest_weights_and_leaves_nothing_behind(service):
    echoed(service, "policy")
    replica = service.replica()
    engines = [pid for pid in descendants(replica) if b"VLLM" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(engines) >= 2
    clients = Clients(service, 4, retries=60)
    until(lambda: clients.versions, "the first response")
    publish(service.run, 7, seed=27)
    os.kill(replica, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in engines), "the end of the engines", 30)
    before = len(clients.versions)
    until(lambda: len(clients.versions) > before + 40, "responses after the restart", 240)
    clients.stop()
    assert clients.errors == []
    assert clients.versions[-1] == "0.7"
    assert set(clients.versions) <= {"0.6", "0.7"}
    np.testing.assert_allclose(echoed(service, "policy"), prompt_logprobs(27, TOKENS), atol=1e-4)


def test_no_token_and_no_prompt_is_in_a_log(service):
    marked = "w91 w92 w93 w94"
    service.ask("POST", "/v1/completions", {"prompt": marked, "max_tokens": 1})
    service.ask("POST", "/v1/completions", {"prompt": marked, "max_tokens": 1, "n": 10**9})
    logs = list(service.logs.iterdir())
    for directory in Path("/tmp/ray").glob("session_*"):
        if any(str(service.process.pid) in part for part in directory.name.split("_")):
            logs += [
                path for path in directory.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")
            ]
    assert len(logs) > 5, "the session's logs were not found"
    secrets = [token.split("_", 2)[2] for token in (service.token, *service.tokens.values())]
    for path in logs:
        text = path.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], path
        assert marked not in text, path


def test_requests_under_way_are_answered_before_the_service_ends(service):
    """Ten at once, each of 1,536 tokens, of which most have not been answered when the service is asked to end."""
    asked = {"prompt": [[number + 2, 6] for number in range(8)], "n": 8, "max_tokens": 24, "ignore_eos": True}
    below = descendants(service.process.pid)

    def under_way() -> float:
        text = service.ask("GET", "/metrics")[2].decode()
        return sum(float(value) for value in re.findall(r"^amenable_requests_in_flight(?:{.*})? (\S+)", text, re.M))

    with ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(service.ask, "POST", "/v1/completions", asked) for _ in range(10)]
        until(lambda: under_way() >= 6, "six requests under way", 30)
        waiting = [answer for answer in answers if not answer.done()]
        service.process.send_signal(signal.SIGTERM)
        assert len(waiting) >= 5, "too few were under way for this to say something"
        for answer in answers:
            status, _, body = answer.result(120)
            assert status == 200, body
            assert [choice["finish_reason"] for choice in json.loads(body)["choices"]] == ["length"] * 64
    assert service.process.wait(120) == 0
    until(lambda: not any(alive(pid) for pid in below), "the end of all processes", 30)
