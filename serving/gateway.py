"""The way into a replica: an ASGI application that lets listed routes through, and nothing else.

In this order: the route is listed, the request is from where it may be, its sender may do it, there is room, the body
is within bounds; then it goes to the engine slot of its model. Engines are given a request of our own making, with a
checked body and no header of the sender's.
"""

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from corpus.problems import RunProblem
from serving.access import Access, csrf_holds
from serving.errors import REPLACED_S, ApiError, bad_request
from serving.metrics import Metrics
from serving.names import POLICY
from serving.page.api import PAGE_ROUTES
from serving.page.backend import Scope, Visitor
from serving.requests import CHECKS, Bounds, Lists, parse, score
from serving.versions import Send

Receive = Callable[[], Awaitable[Any]]

ROUTES: dict[tuple[str, str], Scope | None] = {
    ("GET", "/healthz"): None,
    ("GET", "/metrics"): "read",
    ("GET", "/v1/models"): "read",
    ("POST", "/v1/completions"): "read",
    ("POST", "/v1/chat/completions"): "read",
    ("POST", "/tokenize"): "read",
    ("POST", "/detokenize"): "read",
    ("POST", "/v1/score"): "score",
}
"""The routes of the API, with the scope that each needs; None needs none."""

_PAGE_PATTERNS = [(method, path.split("/")) for method, path in PAGE_ROUTES]

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]
API_HEADERS = [
    *SECURITY_HEADERS,
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

log = logging.getLogger(__name__)


class Models(Protocol):
    """What the gateway asks of the slots."""

    async def holding(self, name: str) -> Any:
        """The slot of a model."""
        ...


Scorer = Callable[[Lists], Awaitable[list[list[float]]]]


@dataclass
class Gateway:
    """The application of one replica."""

    access: Access
    bounds: Bounds
    models: Models
    listed: Callable[[], Awaitable[list[dict[str, Any]]]]
    """What /v1/models tells."""
    scorer: Scorer | None
    """Scores lists of responses; None where the service does not score."""
    metrics: Metrics
    healthy: Callable[[], None]
    """Raises RunProblem where the replica is not."""
    page: Any = None
    """The ASGI application of the page; None leaves it out."""
    log_prompts: bool = False
    channel: str = POLICY
    """The model that a request means which names none."""
    in_flight: int = 0
    """Generating and scoring requests under way."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Any, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        method, path = scope["method"], scope["path"]
        if b"%" in scope.get(
            "raw_path", b""
        ):  # no route has anything to escape: one spelling, as a proxy before sees it
            path = ""
        answer = _Answer(send)
        route = path if (method, path) in ROUTES else "page" if self._is_page(method, path) else "other"
        model = ""
        try:
            headers = _headers(scope)
            if route == "other":
                raise ApiError(404, "not_found", "There is nothing here.")
            self._check_place(scope, headers)
            if route == "page":
                await self._to_page(scope, receive, answer)
            else:
                model = await self._to_api(path, method, scope, headers, receive, answer)
        except ApiError as error:
            model = getattr(error, "model", "")
            await _refuse(answer, error)
        except TimeoutError:
            seconds = self.bounds.limits.request_s
            await _refuse(answer, ApiError(503, "time_limit", f"The request took longer than {seconds:g} s."))
        finally:
            # A client that left is counted as 499, as nginx does.
            self.metrics.answered(route, model, answer.status or 499, time.perf_counter() - started)

    def _is_page(self, method: str, path: str) -> bool:
        if self.page is None:
            return False
        segments = path.split("/")
        return any(
            method == listed
            and len(segments) == len(pattern)
            and all(
                want == got or (want.startswith("{") and _plain(got))
                for want, got in zip(pattern, segments, strict=True)
            )
            for listed, pattern in _PAGE_PATTERNS
        )

    def _check_place(self, scope: Any, headers: Mapping[str, str]) -> None:
        """An open service is this machine's alone: no other client, and no other name, which a page elsewhere could
        have made to mean this machine."""
        if not self.access.open:
            return
        client = scope.get("client")
        host = headers.get("host", "").strip().lower()
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if (client is not None and not _is_loopback(client[0])) or name not in LOOPBACK_HOSTS:
            raise ApiError(403, "forbidden", "This service has no tokens, so it answers this machine alone.")

    async def _to_page(self, scope: Any, receive: Receive, answer: "_Answer") -> None:
        body = await self._body(scope, receive)
        answer.extra = SECURITY_HEADERS

        async def given() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async with asyncio.timeout(self.bounds.limits.request_s):
            await self.page(scope, given, answer)

    async def _to_api(
        self, path: str, method: str, scope: Any, headers: Mapping[str, str], receive: Receive, answer: "_Answer"
    ) -> str:
        """Answer a listed route of the API; returns the model that the request was for, "" where it was for none."""
        needed = ROUTES[method, path]
        visitor = self._visitor(headers, needed, method)
        if path == "/healthz":
            await self._tell_health(answer)
        elif path == "/metrics":
            await answer.whole(200, b"text/plain; version=0.0.4", self.metrics.exposition())
        elif path == "/v1/models":
            await answer.json(200, {"object": "list", "data": await self.listed()})
        else:
            _check_type(headers)
            content = parse(await self._body(scope, receive))
            if path == "/v1/score":
                await self._score(content, answer)
                return "rm"
            return await self._generate(path, content, scope, visitor, answer)
        return ""

    def _visitor(self, headers: Mapping[str, str], needed: Scope | None, method: str) -> Visitor | None:
        if needed is None:
            return None
        visitor = self.access.visitor(headers)
        if visitor is None:
            raise ApiError(401, "invalid_token", "Give a valid token: Authorization: Bearer amn_….")
        if needed not in visitor.scopes:
            raise ApiError(403, "missing_scope", f"This token does not have the scope {needed}.")
        if method != "GET" and not csrf_holds(visitor, headers):
            raise ApiError(403, "missing_csrf_token", "A logged-in browser sends its x-csrf-token with this request.")
        return visitor

    async def _tell_health(self, answer: "_Answer") -> None:
        try:
            self.healthy()
        except RunProblem as problem:
            log.warning("%s", problem)
            raise ApiError(
                503, "unhealthy", "An engine of this replica does not answer.", retry_after_s=REPLACED_S
            ) from None
        await answer.json(200, {"status": "ok"})

    async def _generate(
        self, path: str, content: dict[str, Any], scope: Any, visitor: Visitor | None, answer: "_Answer"
    ) -> str:
        if content.get("model") is None:
            content["model"] = self.channel
        asked = CHECKS[path](content, self.bounds)
        if self.log_prompts:
            log.info("%s asks %s: %s", visitor.name if visitor else "nobody", path, asked.body.decode())
        with self._room():
            try:
                slot = await self.models.holding(asked.model)
                async with asyncio.timeout(self.bounds.limits.request_s):
                    tokens = await slot.handle(_own_scope(scope, path), asked.body, answer, asked.n, API_HEADERS)
            except ApiError as error:
                vars(error)["model"] = asked.model if error.status != 404 else ""
                raise
            self.metrics.generated(asked.model, tokens)
        return asked.model

    async def _score(self, content: dict[str, Any], answer: "_Answer") -> None:
        asked = score(content, self.bounds.limits)
        if self.scorer is None:
            raise ApiError(404, "model_not_found", "This run has no reward model yet.", "model")
        with self._room():
            async with asyncio.timeout(self.bounds.limits.request_s):
                scores = await self.scorer(asked)
        told: list[Any] = [each[0] for each in scores] if asked.pairs else list(scores)
        await answer.json(200, {"object": "scores", "scores": told, "calibration": "demonstrations average 0"})

    def _room(self) -> "_Room":
        if self.in_flight >= self.bounds.limits.concurrent:
            raise ApiError(
                429,
                "too_many_requests",
                f"This replica has {self.in_flight} requests under way, as many as it takes; try again in a second.",
                retry_after_s=1,
            )
        return _Room(self)

    async def _body(self, scope: Any, receive: Receive) -> bytes:
        most = self.bounds.limits.body_bytes
        too_large = ApiError(413, "body_too_large", f"The body is larger than {most} bytes.")
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or len(value) > 18 or int(value) > most):
                raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.bounds.limits.receive_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise bad_request("The client left before the body was there.")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "body_timeout", "The body did not arrive in time.") from None


@dataclass
class _Room:
    """A place among the requests under way."""

    gateway: Gateway

    def __enter__(self) -> None:
        self.gateway.in_flight += 1
        self.gateway.metrics.in_flight(self.gateway.in_flight)

    def __exit__(self, *_: object) -> None:
        self.gateway.in_flight -= 1
        self.gateway.metrics.in_flight(self.gateway.in_flight)


class _Answer:
    """An ASGI `send` that knows what was sent. `extra` are headers that a response gets where it does not have them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.extra: list[tuple[bytes, bytes]] = []

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            have = {name.lower() for name, _ in message["headers"]}
            added = [(name, value) for name, value in self.extra if name not in have]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)

    async def whole(
        self, status: int, kind: bytes, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """One response of the gateway's own."""
        length = (b"content-length", str(len(body)).encode())
        start = [(b"content-type", kind), length, *(headers or []), *API_HEADERS]
        await self({"type": "http.response.start", "status": status, "headers": start})
        await self({"type": "http.response.body", "body": body})

    async def json(self, status: int, content: dict[str, Any]) -> None:
        """One response in JSON."""
        await self.whole(status, b"application/json", json.dumps(content, allow_nan=False).encode())


async def _refuse(answer: _Answer, error: ApiError) -> None:
    if answer.status:  # a stream that has begun can only be ended
        body = b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"
        await answer({"type": "http.response.body", "body": body, "more_body": False})
        return
    kind, *others = error.headers()
    await answer.whole(error.status, kind[1], error.body(), others)


def _headers(scope: Any) -> dict[str, str]:
    """Names in lower case; of several of one name the last. Raises ApiError for two of what must be one."""
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in ("host", "authorization", "content-length") and found.get(name, value) != value:
            raise bad_request(f"The header {name} is there twice.")
        found[name] = value.decode("latin-1")
    return found


def _check_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "The content type should be application/json.")


def _own_scope(scope: Any, path: str) -> dict[str, Any]:
    """What an engine's application is told of a request: where it goes, and nothing of the sender's."""
    return {
        "type": "http",
        "asgi": scope.get("asgi", {"version": "3.0"}),
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"engine"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }


def _plain(segment: str) -> bool:
    return 0 < len(segment) <= 100 and segment not in (".", "..") and all(c.isalnum() or c in "._-" for c in segment)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
