"""The routes of the page: its files, the login, and what it shows beside the models' own API.

Errors have OpenAI's shape, {"error": {"message", "type", "param", "code"}}, as those of the API have.
"""

import hashlib
import secrets
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corpus.problems import RunProblem, UsageProblem
from serving.page.backend import (
    CSRF_HEADER,
    SESSION_COOKIE,
    PageBackend,
    Scope,
    ServedState,
    Visitor,
    Wish,
    WishConflict,
)
from serving.page.run_view import DrawnStage, EncodedPrompt, HeldOutPrompts, PageRun, describe
from serving.page.store import (
    MAX_COMPARISON_BYTES,
    ComparisonStore,
    Listed,
    StoredComparison,
    parse_comparison,
)

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
"""A browser runs and loads only the page's own files, whatever a model wrote."""

SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
"""Headers of every answer of the page's routes."""

STATIC_FILES = {
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        (
            "answer.js",
            "api.js",
            "charts.js",
            "column.js",
            "compose.js",
            "dom.js",
            "kept.js",
            "keys.js",
            "page.js",
            "served.js",
            "session.js",
            "tokens.js",
        ),
        "text/javascript; charset=utf-8",
    ),
}
"""The files of the page beside index.html, and their types. No other name is ever looked for on the disk."""

PAGE_ROUTES: tuple[tuple[str, str], ...] = (
    ("GET", "/"),
    ("GET", "/page/static/{name}"),
    ("GET", "/page/session"),
    ("POST", "/page/login"),
    ("POST", "/page/logout"),
    ("GET", "/page/models"),
    ("GET", "/page/prompts"),
    ("GET", "/page/curves"),
    ("POST", "/page/tokens"),
    ("POST", "/page/comparisons"),
    ("GET", "/page/comparisons/{name}"),
    ("GET", "/page/history"),
    ("POST", "/page/desired"),
)
"""Methods and paths of all that `page_router` answers, for an allow-list."""

Body = TypeVar("Body", bound=BaseModel)

_STATIC = Path(__file__).parent / "static"
_SMALL_BODY_BYTES = 4096
_PROMPT_BODY_BYTES = 1 << 19


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoginBody(_Body):
    """What the login dialog sends."""

    token: str = Field(min_length=1, max_length=1024, description="A bearer token.")


class PromptBody(_Body):
    """A prompt to be encoded."""

    prompt: str = Field(min_length=1, max_length=200_000, description="The prompt's text.")


class WishBody(_Body):
    """A change of what is served as `policy`."""

    pinned: str | None = Field(max_length=200, description="A model policy@N; null follows the newest.")
    seen: int = Field(ge=0, description="Number of the wish that the page showed.")


class SessionAnswer(_Body):
    """Who looks at the page."""

    visitor: Visitor | None = Field(description="Null before the login.")
    run: str | None = Field(description="The run's name; null before the login.")
    synthetic: bool = Field(description="Whether a program stood in for people; false before the login.")


class HistoryAnswer(_Body):
    """The comparisons that were kept last."""

    comparisons: list[Listed] = Field(description="The newest first.")


class CurvesAnswer(_Body):
    """The curves of the run so far."""

    stages: list[DrawnStage] = Field(description="The stage that matters most first.")


class PageProblem(Exception):
    """A request of the page that is refused: an HTTP status, a word for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _TellingRoute(APIRoute):
    """A route that answers expected problems with their sentence, and everything with the security headers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def telling(request: Request) -> Response:
            try:
                response = await handle(request)
            except PageProblem as problem:
                response = _refusal(problem)
            except WishConflict as conflict:
                response = _refusal(PageProblem(409, "changed_meanwhile", str(conflict)))
            except UsageProblem as problem:
                told = PageProblem(400, "not_possible", str(problem))
                if problem.code == "storage/locked":  # somebody else writes: it goes over
                    told = PageProblem(503, "busy", str(problem))
                response = _refusal(told)
            except RunProblem as problem:
                response = _refusal(PageProblem(500, "run_problem", str(problem)))
            for name, value in SECURITY_HEADERS.items():
                response.headers[name] = value
            response.headers.setdefault("cache-control", "no-store")
            return response

        return telling


def page_router(run: PageRun, backend: PageBackend) -> APIRouter:
    """The routes of PAGE_ROUTES for `run`, in the service `backend`."""
    router = APIRouter(route_class=_TellingRoute, include_in_schema=False)
    store = ComparisonStore(run.directory / "serving" / "comparisons", run.send)

    async def allowed(request: Request, scope: Scope) -> Visitor:
        visitor = await _visitor(request, backend)
        if visitor is None:
            raise PageProblem(401, "invalid_token", "Log in with a token to see this.")
        if scope not in visitor.scopes:
            raise PageProblem(403, "missing_scope", f"The token {visitor.name} lacks the scope {scope}.")
        return visitor

    @router.get("/")
    async def page() -> Response:
        return _file("index.html", "text/html; charset=utf-8")

    @router.get("/page/static/{name}")
    async def static(name: str) -> Response:
        if name not in STATIC_FILES:
            raise PageProblem(404, "not_found", "There is no such file.")
        return _file(name, STATIC_FILES[name])

    @router.get("/page/session")
    async def session(request: Request) -> SessionAnswer:
        return await _session(await _visitor(request, backend), run)

    @router.post("/page/login")
    async def login(request: Request, response: Response) -> SessionAnswer:
        body = await _parsed(request, LoginBody, _SMALL_BODY_BYTES)
        found = await backend.log_in(body.token)
        if found is None:
            raise PageProblem(401, "invalid_token", "This token is not known here, or it has been revoked.")
        response.set_cookie(
            SESSION_COOKIE,
            found.cookie,
            max_age=found.seconds,
            path="/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return await _session(found.visitor, run)

    @router.post("/page/logout")
    async def logout(request: Request, response: Response) -> SessionAnswer:
        await allowed(request, "read")
        await backend.log_out(request.cookies.get(SESSION_COOKIE, ""))
        response.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
        return await _session(None, run)

    @router.get("/page/models")
    async def models(request: Request) -> ServedState:
        await allowed(request, "read")
        return await backend.state()

    @router.get("/page/prompts")
    async def prompts(request: Request) -> HeldOutPrompts:
        await allowed(request, "read")
        return await run.prompts()

    @router.get("/page/curves")
    async def curves(request: Request) -> CurvesAnswer:
        await allowed(request, "read")
        return CurvesAnswer(stages=await run.curves())

    @router.post("/page/tokens")
    async def tokens(request: Request) -> EncodedPrompt:
        await allowed(request, "read")
        return await run.encode((await _parsed(request, PromptBody, _PROMPT_BODY_BYTES)).prompt)

    @router.post("/page/comparisons", status_code=201)
    async def keep(request: Request) -> StoredComparison:
        visitor = await allowed(request, "read")
        comparison = parse_comparison(await _body(request, MAX_COMPARISON_BYTES))
        return await run_in_threadpool(store.keep, comparison, visitor.name)

    @router.get("/page/comparisons/{name}")
    async def kept(request: Request, name: str) -> StoredComparison:
        await allowed(request, "read")
        found = await run_in_threadpool(store.read, name)
        if found is None:
            raise PageProblem(404, "not_found", "There is no comparison with this id; it may have been removed.")
        return found

    @router.get("/page/history")
    async def history(request: Request) -> HistoryAnswer:
        await allowed(request, "read")
        return HistoryAnswer(comparisons=await run_in_threadpool(store.newest))

    @router.post("/page/desired")
    async def desired(request: Request) -> Wish:
        visitor = await allowed(request, "operate")
        body = await _parsed(request, WishBody, _SMALL_BODY_BYTES)
        return await backend.want(body.pinned, body.seen, visitor.name)

    return router


async def _visitor(request: Request, backend: PageBackend) -> Visitor | None:
    """Who asks. Raises PageProblem where a session's request changes something and lacks the CSRF token."""
    visitor = await backend.visitor(request)
    if visitor is None or visitor.csrf is None or request.method in ("GET", "HEAD"):
        return visitor
    given = request.headers.get(CSRF_HEADER, "")
    if not secrets.compare_digest(given.encode(), visitor.csrf.encode()):
        raise PageProblem(403, "invalid_csrf", f"The header {CSRF_HEADER} is not that of this session; load the page.")
    return visitor


async def _session(visitor: Visitor | None, run: PageRun) -> SessionAnswer:
    if visitor is None:
        return SessionAnswer(visitor=None, run=None, synthetic=False)
    return SessionAnswer(visitor=visitor, **await run_in_threadpool(describe, run))


async def _body(request: Request, limit: int) -> bytes:
    """The body of at most `limit` bytes. A form of another site cannot send JSON, so nothing else is taken."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise PageProblem(415, "not_json", "The body should be JSON, sent as application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise PageProblem(413, "too_large", f"The body may have {limit:,} bytes; this one is larger.")
    return bytes(body)


async def _parsed(request: Request, kind: type[Body], limit: int) -> Body:
    try:
        return kind.model_validate_json(await _body(request, limit))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole body"
        raise PageProblem(400, "invalid_body", f"This body cannot be used ({where}: {first['msg']}).") from error


def _refusal(problem: PageProblem) -> Response:
    kinds = {401: "authentication_error", 403: "permission_error", 500: "server_error"}
    error: dict[str, Any] = {
        "message": problem.message,
        "type": kinds.get(problem.status, "invalid_request_error"),
        "param": None,
        "code": problem.code,
    }
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else None
    return JSONResponse({"error": error}, status_code=problem.status, headers=headers)


def _file(name: str, kind: str) -> Response:
    content, digest = _content(name)
    return Response(content, media_type=kind, headers={"cache-control": "no-cache", "etag": f'"{digest}"'})


@cache
def _content(name: str) -> tuple[bytes, str]:
    content = (_STATIC / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:32]
