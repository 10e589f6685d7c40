"""Five hundred requests that nobody sensible sends, against the whole service: it answers each in OpenAI's shape, says
no with the right number, never falls over, and tells its log no secret."""

import contextlib
import http.client
import json
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gateway import ROUTES
from tests.serving.served import Service, serving

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

REQUESTS = 500
BODY_BYTES = 1 << 16
ALLOWED = {200, 400, 401, 403, 404, 408, 413, 415, 429, 503}
CODES_503 = {"model_loading", "time_limit"}
PARSER = b"<h1>400 Bad request</h1>\nYour browser sent an invalid request."
"""What HAProxy says by itself of what is no HTTP, such as an odd Host, before any rule of its configuration."""

seen: Counter[int] = Counter()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = {"concurrent": 64, "body_bytes": BODY_BYTES, "request_s": 60.0}
    with serving(tmp_path_factory.mktemp("fuzz"), memory_budget_gib=2.5, engine_gib=2.5, limits=limits) as service:
        yield service


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=12), children, max_size=4),
    max_leaves=12,
)
integers = st.sampled_from([-(2**70), -1, 0, 1, 2, 24, 25, 97, 2**31, 2**63, 10**40, True, 1.5, "3"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(
        [
            "policy",
            "sft",
            "policy@1",
            "policy@2",
            "../../etc/passwd",
            "policy@../x",
            "",
            "\x00",
            "a" * 5000,
            7,
            ["policy"],
        ]
    ),
    "prompt": st.one_of(
        st.text(max_size=60),
        st.lists(st.integers(-2, 120), max_size=70),
        st.lists(st.lists(st.integers(0, 96), max_size=9), max_size=9),
        st.lists(st.text(max_size=9), max_size=40),
        json_values,
    ),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", 1]), "content": json_values}
        ),
        max_size=4,
    ),
    "tokens": st.lists(st.integers(-2, 120), max_size=70),
    "pairs": st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=30), "response": json_values}), max_size=4),
    "lists": json_values,
    "max_tokens": integers,
    "max_completion_tokens": integers,
    "min_tokens": integers,
    "n": integers,
    "logprobs": integers,
    "top_logprobs": integers,
    "seed": integers,
    "top_k": integers,
    "temperature": st.floats() | integers,
    "top_p": st.floats() | integers,
    "min_p": st.floats() | integers,
    "frequency_penalty": st.floats() | integers,
    "presence_penalty": st.floats() | integers,
    "repetition_penalty": st.floats() | integers,
    "stop": json_values,
    "stop_token_ids": st.lists(st.integers(-2, 120), max_size=20),
    "echo": st.booleans() | json_values,
    "stream": st.booleans() | json_values,
    "stream_options": json_values,
    "ignore_eos": json_values,
    "skip_special_tokens": json_values,
    "add_special_tokens": json_values,
    "return_token_ids": json_values,
    "logit_bias": json_values,
    "structured_outputs": json_values,
    "kv_transfer_params": json_values,
    "prompt_embeds": st.text(max_size=40),
}
plausible = {
    "/v1/completions": {"model": "policy", "prompt": "w5 w6", "max_tokens": 2},
    "/v1/chat/completions": {"model": "policy", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 2},
    "/tokenize": {"model": "policy", "prompt": "w5"},
    "/detokenize": {"model": "policy", "tokens": [5]},
    "/v1/score": {"model": "rm", "pairs": [{"prompt": "w5", "response": "w6"}]},
}
extras = st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
nearly_right = st.sampled_from(sorted(plausible)).flatmap(
    lambda path: st.tuples(st.just(path), extras.map(lambda extra: {**plausible[path], **extra}))
)
"""A route, and a body for it with up to two fields that are odd."""

raw_bodies = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [b"", b"{", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe{}", b'{"prompt": "\\ud800"}', b"1" * 5000, b"NaN"]
    ),
    st.sampled_from(
        [
            b'{"pairs": [{"prompt": "\\ud800", "response": "w5"}]}',
            b'{"pairs": [{"prompt": "w5", "response": "' + b"w5 " * 20000 + b'"}]}',
        ]
    ),
    st.just(b"x" * (BODY_BYTES + 1)),
)
odd_paths = st.one_of(
    st.sampled_from(sorted({path for _, path in ROUTES})),
    st.sampled_from(
        ["/v1/../metrics", "//v1/models", "/v1/models/..%2f..%2fetc", "/page/static/..%2f..%2fapi.py", "/invocations",
         "/v1/responses", "/docs", "/openapi.json", "/v1/load_lora_adapter", "/collective_rpc", "/v1/models?x=%00",
         "/page/comparisons/..%2f..%2fdesired", "/sleep", "/-/nothing"]
    ),
    st.text(string.ascii_letters + "/._-%", min_size=1, max_size=30).map(lambda text: "/" + text),
)  # fmt: skip
anything = st.tuples(odd_paths, st.one_of(json_values, raw_bodies, st.sampled_from(list(plausible.values()))))
broken = st.tuples(st.sampled_from(sorted(plausible)), raw_bodies)
methods = st.sampled_from(["POST"] * 30 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
tokens = st.sampled_from(["own"] * 30 + ["none", "wrong", "empty", "basic", "long", "read"])
hosts = st.sampled_from(["", "", "", "evil.example", "localhost:1", "127.0.0.1.evil", "a" * 300, "[::1", "x y"])
extra_headers = st.dictionaries(
    st.sampled_from(["X-Request-Id", "X-Forwarded-For", "X-data-parallel-rank", "Origin", "Cookie", "traceparent",
                     "Content-Encoding", "x-csrf-token", "Accept", "X-Request-Timeout-Seconds", "X-Session-Id",
                     "X-Request-Disconnect-Disabled", "serve_multiplexed_model_id", "serve-multiplexed_model-id",
                     "X-Session_Id"]),
    st.text(string.printable.strip() + "\x80\xe9\xff", max_size=40) | st.sampled_from(["\xff", "1e-6", "?1"]),
    max_size=3,
)  # fmt: skip
"""Those by which Ray Serve is directed among them; bytes above 127 are no UTF-8."""


def send(service: Service, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=90)
    try:
        connection.putrequest(method, path.replace(" ", ""), skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        if "Content-Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read it all
            connection.send(body)
        response = connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read()
    finally:
        connection.close()


@settings(
    max_examples=REQUESTS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    method=methods, asked=st.one_of(*[nearly_right] * 6, broken, anything), who=tokens, host=hosts,
    extra=extra_headers, kind=st.sampled_from(["application/json"] * 30 + ["text/plain", "multipart/form-data", ""]),
)  # fmt: skip
def test_whatever_is_asked_the_answer_is_a_proper_one(service, method, asked, who, host, extra, kind):
    path, content = asked
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    secrets = {
        "own": f"Bearer {service.token}",
        "wrong": "Bearer amn_000000000000_" + "a" * 43,
        "empty": "Bearer ",
        "basic": "Basic " + service.token,
        "long": "Bearer " + "a" * 8000,
        "read": f"Bearer {service.tokens['read']}",
    }
    headers = {**extra, "Content-Type": kind}
    if who in secrets:
        headers["Authorization"] = secrets[who]
    if host:
        headers["Host"] = host
    status, given_kind, answer = send(service, method, path, body, headers)
    seen[status] += 1
    assert status in ALLOWED | {405}, (status, answer[:300])
    if status >= 400 and method != "HEAD" and PARSER not in answer:
        assert given_kind.startswith("application/json"), (status, given_kind, answer[:300])
        error = json.loads(answer)["error"]
        assert error["message"]
        if status == 503:
            assert error["code"] in CODES_503, error
    assert b"Traceback" not in answer
    assert service.token.encode() not in answer


def test_it_is_as_well_as_before(service):
    """After the others: as many answered as were sent, every kind of answer among them, and the service still works."""
    assert sum(seen.values()) >= REQUESTS
    assert {200, 400, 401, 403, 404, 413, 415} <= set(seen), seen
    assert seen[200] > 50, seen
    assert seen[400] > 50, seen
    assert service.ask("POST", "/v1/completions", {"model": "policy", "prompt": "w5", "max_tokens": 2})[0] in (200, 503)
    assert service.process.poll() is None
    logs = [path for path in service.logs.iterdir() if path.is_file()]
    logs += [
        path
        for directory in Path("/tmp/ray").glob(f"session_*_{service.process.pid}")
        for path in directory.rglob("*")
        if path.suffix in (".log", ".out", ".err")
    ]
    assert len(logs) > 5
    for path in logs:
        text = path.read_text(errors="replace")
        for token in (service.token, *service.tokens.values()):
            assert token.split("_", 2)[2] not in text, path


def test_the_service_tells_requests_apart(service):
    """A negative control of the list of allowed answers: what is right is answered with 200, what is wrong is not."""
    right = {"model": "policy", "prompt": "w5", "max_tokens": 2}
    assert service.client().completions.create(**right).choices  # pyright: ignore[reportArgumentType]
    assert service.ask("POST", "/v1/completions", {**right, "max_tokens": 25})[0] == 400
