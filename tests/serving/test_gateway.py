"""The gateway before engines that are stand-ins: which routes there are, who gets through, and how it refuses."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from corpus.problems import RunProblem
from serving.access import Access, new_token
from serving.engine import EngineSlot
from serving.errors import ApiError
from serving.gateway import ROUTES, Gateway
from serving.metrics import Metrics
from serving.page.api import PAGE_ROUTES
from serving.requests import Bounds
from serving.settings import Limits, ServingSettings
from serving.versions import CURRENT

BODY = {"model": "policy", "prompt": "w5"}


class StandInApp:
    """What vLLM's application would answer: the body it was given, or events."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.events = [b'data: {"text":"a"}\n\n', b'data: {"text":"b"}\n\n', b"data: [DONE]\n\n"]
        self.left = False
        self.waits = asyncio.Event()
        self.waits.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body = json.loads((await receive())["body"])
        if not self.waits.is_set():
            left = asyncio.create_task(receive())
            waited = asyncio.create_task(self.waits.wait())
            await asyncio.wait({left, waited}, return_when=asyncio.FIRST_COMPLETED)
            self.left = left.done()
            waited.cancel()
        spans = CURRENT.get()
        assert spans is not None
        kind = b"text/event-stream; charset=utf-8" if body.get("stream") else b"application/json"
        headers = [(b"content-type", kind), (b"access-control-allow-origin", b"*"), (b"server", b"vllm")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        versions = [SimpleNamespace(version="0.1", start=0, end=2), SimpleNamespace(version="0.2", start=2, end=3)]
        if not body.get("stream"):
            spans.note(0, SimpleNamespace(index=0, weight_versions=versions))
            await send({"type": "http.response.body", "body": json.dumps({"asked": body}).encode()})
            return
        for number, event in enumerate(self.events):
            if number == 1:
                spans.note(0, SimpleNamespace(index=0, weight_versions=versions))
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class OneSlot:
    """One engine slot, which holds `policy`; `sft` is loading."""

    def __init__(self, app: StandInApp) -> None:
        self.slot = EngineSlot(0, ServingSettings(), 64)
        self.slot.holds, self.slot.version = "policy", "0.1"
        self.slot._app = app  # pyright: ignore[reportAttributeAccessIssue]

    async def holding(self, name: str) -> Any:
        if name == "policy":
            return self.slot
        if name == "sft":
            raise ApiError(503, "model_loading", "sft is being loaded.", "model", retry_after_s=1.2)
        raise ApiError(404, "model_not_found", f"There is no model {name!r}.", "model")


class Service:
    """A gateway, and a client of it that is on this machine."""

    def __init__(self, directory: Any, limits: Limits | None = None, token_file: Any = None, client: str = "127.0.0.1"):
        self.app = StandInApp()
        self.models = OneSlot(self.app)
        self.unhealthy: str | None = None

        async def listed() -> list[dict[str, Any]]:
            return [{"id": "policy"}]

        async def scorer(asked: Any) -> list[list[float]]:
            return [[float(len(text)) for text, _ in responses] for _, responses in asked.items]

        async def page(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
            await send({"type": "http.response.body", "body": scope["path"].encode()})

        def healthy() -> None:
            if self.unhealthy:
                raise RunProblem(self.unhealthy, "run/unexpected")

        self.gateway = Gateway(
            access=Access(directory, token_file),
            bounds=Bounds(limits or Limits(), 64, 40, 24, 97),
            models=self.models,
            listed=listed,
            scorer=scorer,
            metrics=Metrics(),
            healthy=healthy,
            page=page,
        )
        self._transport = httpx.ASGITransport(self.gateway, client=(client, 1))

    def ask(self, method: str, path: str, host: str = "localhost:8000", **given: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url=f"http://{host}") as client:
                return await client.request(method, path, **given)

        return asyncio.run(asked())

    def post(self, path: str = "/v1/completions", body: Any = BODY, **given: Any) -> httpx.Response:
        return self.ask("POST", path, json=body, **given)


@pytest.fixture
def service(tmp_path) -> Service:
    return Service(tmp_path)


def status_of(service: Service, method: str, path: str) -> int:
    """Of a request whose path is just this: clients tidy paths up."""
    found: list[Any] = []

    async def asked() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None:
            found.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "headers": headers}
        await service.gateway({**scope, "client": ("127.0.0.1", 1)}, receive, send)

    asyncio.run(asked())
    return found[0]["status"]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_completion_carries_the_version_at_admission_and_the_spans(service):
    response = service.post()
    assert response.status_code == 200
    assert response.headers["x-amenable-version"] == "0.1"
    assert response.json()["asked"]["prompt"] == "w5"
    assert response.json()["amenable"]["versions"] == [
        {"index": 0, "version": "0.1", "start": 0, "end": 2},
        {"index": 0, "version": "0.2", "start": 2, "end": 3},
    ]
    assert int(response.headers["content-length"]) == len(response.content)


def test_the_last_chunk_of_a_stream_carries_the_spans(service):
    response = service.post(body={**BODY, "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [chunk["text"] for chunk in chunks] == ["a", "b"]
    assert "amenable" not in chunks[0]
    assert chunks[1]["amenable"]["versions"][1]["version"] == "0.2"


def test_nothing_of_the_sender_reaches_the_engine_and_no_header_of_the_engine_opens_it_to_others(service):
    evil = {"Origin": "http://evil.example", "X-Request-Id": "x" * 99, "X-data-parallel-rank": "7", "Cookie": "a=b"}
    response = service.post(headers=evil)
    [scope] = service.app.scopes
    assert scope["headers"] == [(b"host", b"engine"), (b"content-type", b"application/json")]
    assert "access-control-allow-origin" not in response.headers
    assert "server" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_every_listed_route_answers_and_everything_else_is_not_there(service):
    for method, path in ROUTES:
        body = {"pairs": [{"prompt": "a", "response": "bc"}]} if path == "/v1/score" else {**BODY, "tokens": [1]}
        allowed = {"/tokenize": ("prompt",), "/detokenize": ("tokens",)}.get(path, tuple(body))
        if path == "/v1/completions":
            allowed = ("model", "prompt")
        given = {name: value for name, value in body.items() if name in allowed}
        if path == "/v1/chat/completions":
            given = {"messages": [{"role": "user", "content": "w5"}]}
        assert service.ask(method, path, json=given if method == "POST" else None).status_code == 200, (method, path)
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"} - {method}:
            assert service.ask(other, path).status_code == 404, (other, path)
    for method, path in PAGE_ROUTES:
        assert service.ask(method, path.replace("{name}", "a1.js")).status_code == 200, (method, path)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions/",
        "//v1/completions",
        "/V1/completions",
        "/v1/../v1/completions",
        "/v1/completions%2f",
        "/v1%2fcompletions",
        "/page/static/../api.py",
        "/page/static/..%2fapi.py",
        "/page/static/.",
        "/page/static/a/b",
        "/page/comparisons/",
        "/page",
        "/docs",
        "/openapi.json",
        "/invocations",
        "/v1/responses",
        "/-/routes",
        "/v1/load_lora_adapter",
    ],
)
def test_paths_that_look_like_a_route_are_not_there(service, path):
    for method in ("GET", "POST"):
        assert status_of(service, method, path) == 404


def test_every_route_of_vllm_but_the_listed_ones_is_out_of_reach(service):
    """The list is compared with what vLLM has in test_service.py, where it is imported anyhow."""
    assert {path for _, path in ROUTES} == {
        "/healthz",
        "/metrics",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/v1/score",
    }


def test_a_model_that_loads_is_told_of_and_one_that_is_none_too(service):
    loading = service.post(body={**BODY, "model": "sft"})
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "2")
    assert error_of(loading)["code"] == "model_loading"
    for name in ("nothing", "../../etc/passwd", "policy@../x", "", "\u0000"):
        assert error_of(service.post(body={**BODY, "model": name}))["code"] == "model_not_found"


@pytest.fixture
def guarded(tmp_path) -> tuple[Service, dict[str, str]]:
    file = tmp_path / "tokens.json"
    tokens = {scope: new_token(file, scope, frozenset({scope})) for scope in ("read", "score", "operate")}  # pyright: ignore
    return Service(tmp_path, token_file=file, client="10.1.2.3"), tokens


def test_each_route_needs_its_scope(guarded):
    service, tokens = guarded
    for (method, path), needed in ROUTES.items():
        without = service.ask(method, path, json={})
        if needed is None:
            assert without.status_code == 200
            continue
        assert without.status_code == 401
        assert without.headers["www-authenticate"].startswith("Bearer")
        for scope, token in tokens.items():
            response = service.ask(method, path, json={}, headers={"Authorization": f"Bearer {token}"})
            assert (response.status_code == 403) == (scope != needed), (path, scope)


@pytest.mark.parametrize("value", ["Bearer", "Bearer ", "Bearer x", "bearer amn_", "Token a", "Bearer \xff"])
def test_wrong_tokens_are_refused(guarded, value):
    service, _ = guarded
    assert service.post(headers={"Authorization": value.encode("latin-1")}).status_code == 401


def test_two_tokens_in_one_request_are_refused(guarded):
    service, tokens = guarded
    pairs = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {tokens['read']}")]
    assert service.post(headers=pairs).status_code == 400


def test_a_session_needs_its_csrf_token_to_generate(guarded):
    service, tokens = guarded
    session = service.gateway.access.log_in(tokens["read"])
    assert session is not None
    cookie = {"Cookie": f"amenable_session={session.cookie}"}
    assert error_of(service.post(headers=cookie))["code"] == "missing_csrf_token"
    assert service.ask("GET", "/v1/models", headers=cookie).status_code == 200
    assert service.post(headers={**cookie, "x-csrf-token": session.visitor.csrf}).status_code == 200


def test_an_open_service_answers_this_machine_alone(tmp_path):
    assert Service(tmp_path).post().status_code == 200
    for host in ("localhost", "127.0.0.1:9", "[::1]:8000"):
        assert Service(tmp_path).post(host=host).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
        assert Service(tmp_path).post(host=host).status_code == 403, host
    assert Service(tmp_path, client="10.0.0.7").post().status_code == 403


def test_bodies_are_bounded_and_of_the_right_type(tmp_path):
    service = Service(tmp_path, Limits(body_bytes=1024))
    assert error_of(service.post(body={"prompt": "w" * 1024}))["code"] == "body_too_large"

    async def parts() -> Any:
        for _ in range(3):
            yield b"x" * 500

    kind = {"Content-Type": "application/json"}
    assert service.ask("POST", "/v1/completions", content=parts(), headers=kind).status_code == 413
    assert (
        service.ask("POST", "/v1/completions", content=b"{}", headers={**kind, "Content-Length": "-1"}).status_code
        == 413
    )
    assert service.ask("POST", "/v1/completions", content=b"{}").status_code == 415
    assert service.ask("POST", "/v1/completions", content=b"{", headers=kind).status_code == 400


def test_one_request_too_many_is_told_to_come_again(tmp_path):
    service = Service(tmp_path, Limits(concurrent=1))

    async def scene() -> list[int]:
        service.app.waits.clear()
        async with httpx.AsyncClient(transport=service._transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while not service.gateway.in_flight:
                await asyncio.sleep(0.001)
            second = await client.post("/v1/completions", json=BODY)
            assert second.headers["retry-after"] == "1"
            service.app.waits.set()
            third_after = (await first).status_code
            third = await client.post("/v1/completions", json=BODY)
            return [third_after, second.status_code, third.status_code]

    assert asyncio.run(scene()) == [200, 429, 200]


def test_a_request_that_takes_too_long_is_ended_in_the_engine_too(tmp_path):
    service = Service(tmp_path, Limits(request_s=0.05))

    async def scene() -> httpx.Response:
        service.app.waits.clear()
        async with httpx.AsyncClient(transport=service._transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json=BODY)

    response = asyncio.run(scene())
    assert (response.status_code, error_of(response)["code"]) == (503, "time_limit")
    assert service.app.left
    assert service.models.slot.in_flight == 0


class DyingApp:
    """What vLLM's application answers where its engine dies in the midst of a request. `dies` may be told not to."""

    def __init__(self, slot: EngineSlot, dies: bool = True, raises: bool = False) -> None:
        self._slot, self._dies, self._raises = slot, dies, raises

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        streams = json.loads((await receive())["body"]).get("stream", False)
        error = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}
        body = json.dumps({"error": error}).encode()
        kind = b"text/event-stream; charset=utf-8" if streams else b"application/json"
        if streams:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": b'data: {"text":"a"}\n\n', "more_body": True})
        self._slot._engine = SimpleNamespace(errored=self._dies)
        if not streams:
            await send({"type": "http.response.start", "status": 500, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self._raises:  # as Starlette does behind the answer to what nobody has foreseen
            raise RuntimeError("the engine is gone")


def is_told_of_the_engine(response: httpx.Response) -> bool:
    return (response.status_code, response.headers.get("retry-after"), error_of(response)["code"]) == (
        503,
        "5",
        "engine_lost",
    )


def test_an_engine_that_has_died_is_told_of_before_its_heart_stops(service):
    service.models.slot._engine = SimpleNamespace(errored=True)
    for stream in (False, True):
        assert is_told_of_the_engine(service.post(body={**BODY, "stream": stream}))
    assert service.app.scopes == []
    service.models.slot._engine = SimpleNamespace(errored=False)
    assert service.post().status_code == 200


@pytest.mark.parametrize("raises", [False, True])
def test_an_engine_that_dies_in_the_midst_of_a_request_is_no_internal_error(service, raises):
    slot = service.models.slot
    slot._app = DyingApp(slot, raises=raises)
    response = service.post()
    assert is_told_of_the_engine(response)
    assert error_of(response)["type"] == "service_unavailable_error"
    assert slot.in_flight == 0
    text = service.ask("GET", "/metrics").text
    assert 'amenable_requests_total{model="policy",route="/v1/completions",status="503"} 1.0' in text


def test_a_stream_whose_engine_dies_ends_with_the_same_error(service):
    service.models.slot._app = DyingApp(service.models.slot)
    events = service.post(body={**BODY, "stream": True}).text.split("\n\n")
    assert events[0] == 'data: {"text":"a"}'
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_lost"
    assert events[2:] == ["data: [DONE]", ""]


def test_an_error_of_an_engine_that_lives_stays_what_it_is(service):
    service.models.slot._app = DyingApp(service.models.slot, dies=False)
    assert service.post().status_code == 500
    assert "InternalServerError" in service.post(body={**BODY, "stream": True}).text


def test_scores_keep_the_shape_of_what_was_asked(service):
    pairs = [{"prompt": "a", "response": "bc"}, {"prompt": "a", "response": "bcd"}]
    answer = service.post("/v1/score", {"model": "rm", "pairs": pairs}).json()
    assert answer["scores"] == [2.0, 3.0]
    assert answer["calibration"] == "demonstrations average 0"
    lists = [{"prompt": "a", "responses": ["b", "bc"]}, {"prompt": "a", "responses": ["bcd"]}]
    assert service.post("/v1/score", {"lists": lists}).json()["scores"] == [[1.0, 2.0], [3.0]]
    service.gateway.scorer = None
    assert service.post("/v1/score", {"lists": lists}).status_code == 404


def test_health_is_the_engines(service):
    assert service.ask("GET", "/healthz").status_code == 200
    service.unhealthy = "The loop of engine 0 has not answered."
    assert service.ask("GET", "/healthz").status_code == 503


def test_metrics_have_no_label_that_a_sender_made_up(service):
    service.post()
    service.post(body={**BODY, "model": "made-up-model"})
    service.ask("GET", "/made-up-path")
    text = service.ask("GET", "/metrics").text
    assert 'amenable_requests_total{model="policy",route="/v1/completions",status="200"} 1.0' in text
    assert 'amenable_generated_tokens_total{model="policy"} 3.0' in text
    assert "made-up" not in text


def test_prompts_are_logged_only_where_that_is_asked_for(service, caplog):
    caplog.set_level("DEBUG")
    service.post(body={**BODY, "prompt": "w77"})
    assert "w77" not in caplog.text
    service.gateway.log_prompts = True
    service.post(body={**BODY, "prompt": "w78"})
    assert "w78" in caplog.text


def test_the_channel_is_what_a_request_without_a_model_means(service):
    assert service.post(body={"prompt": "w5"}).json()["asked"]["model"] == "policy"
    service.gateway.channel = "sft"
    assert service.post(body={"prompt": "w5"}).status_code == 503
