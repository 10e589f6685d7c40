"""What the page needs to be told by the service it stands in: who asks, which models there are, what is wanted."""

from typing import Literal, Protocol

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["read", "score", "operate"]

SESSION_COOKIE = "amenable_session"
"""Name of the cookie of a logged-in browser: HttpOnly and SameSite=Strict, so no script and no other site has it."""

CSRF_HEADER = "x-csrf-token"
"""Header of every request of a session that is not a GET: browsers send the cookie by themselves, but not this."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Visitor(_Answer):
    """Who asks, and what they may do."""

    name: str = Field(description="Name of the token, as people gave it.")
    scopes: frozenset[Scope] = Field(description="What the token allows.")
    csrf: str | None = Field(
        default=None,
        description="The CSRF token of a cookie session; null with a bearer token, and where no token is needed.",
    )
    login: bool = Field(default=True, description="False where the service is open and nobody needs to log in.")


class Session(_Answer):
    """A browser that has just logged in."""

    cookie: str = Field(description="Value of the cookie.")
    seconds: int = Field(gt=0, description="How long it is valid.")
    visitor: Visitor = Field(description="Whose it is, with its CSRF token.")


class ServedModel(_Answer):
    """One name that requests may give as `model`."""

    name: str = Field(description="policy, policy-ema, sft, reference, base, policy@N.")
    title: str = Field(description="What it is, in a few words for people.")
    version: str | None = Field(description="Version of the weights that it means now; null where not known.")
    loaded: bool = Field(description="Whether an engine holds it; others are loaded when they are asked for.")


class Wish(_Answer):
    """What the replicas should serve as `policy`: the content of RUN/serving/desired.json."""

    counter: int = Field(ge=0, description="Number of the change; 0 before the first.")
    pinned: str | None = Field(description="The model that `policy` is held at (policy@N); null follows the newest.")
    who: str | None = Field(default=None, description="Who asked for it.")
    when: str | None = Field(default=None, description="When, as an ISO time.")


class ServedLimits(_Answer):
    """Limits of a request that the page tells people before they meet them."""

    max_tokens: int = Field(ge=1, description="Largest max_tokens.")
    prompt_tokens: int = Field(ge=1, description="Longest prompt, tokens.")


class ServedState(_Answer):
    """What is served at this moment."""

    models: list[ServedModel] = Field(description="All names, those that the page offers first in front.")
    wish: Wish = Field(description="What the replicas should serve.")
    limits: ServedLimits = Field(description="Limits of a request.")


class WishConflict(Exception):
    """Somebody else has changed the wish since; the text is the sentence for the person who meets it."""


class PageBackend(Protocol):
    """The service around the page."""

    async def visitor(self, request: Request) -> Visitor | None:
        """Who sends `request`, by its bearer token or its cookie; None where neither is valid. The CSRF token of a
        session is checked by the caller."""
        ...

    async def log_in(self, token: str) -> Session | None:
        """A session for the owner of `token`; None where the token is not valid. Takes the same time either way."""
        ...

    async def log_out(self, cookie: str) -> None:
        """Ends the session of this cookie, if there is one."""
        ...

    async def state(self) -> ServedState:
        """What is served now."""
        ...

    async def want(self, pinned: str | None, seen: int, who: str) -> Wish:
        """Writes the wish that follows the one numbered `seen`, and returns it. Raises WishConflict where another came
        between, UsageProblem where there is no such model."""
        ...
