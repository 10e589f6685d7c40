"""What tests of the page in a browser are written with: a visit to the page, and what may be looked at there.

A test module has the fixtures by `pytest_plugins = ["tests.serving.page_fixtures"]`, and is marked NEEDS_CHROMIUM.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from playwright.sync_api import expect

from tests.serving.page_stand_in import StandIn

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT_MS = 20_000
PROMPT = "a prompt that stays secret"

NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"
)

WATCH = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@dataclass
class Server:
    """The stand-in at an address of this machine."""

    url: str
    service: StandIn


def is_a_mistake(message) -> bool:
    # what the service refuses is logged by the browser itself
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def wait_for(holds: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)


def log_in(page, token: str) -> None:
    page.locator("#token").fill(token)
    page.locator("#login button[type=submit]").click()
    ready(page)


def ready(page) -> None:
    expect(page.locator("html[data-ready=yes]")).to_have_count(1, timeout=LIMIT_MS)


def ask(page, prompt: str = PROMPT) -> None:
    page.locator("#prompt").fill(prompt)
    page.locator("#run").click()


def column(page, model: str):
    return page.locator(f".answer[data-model='{model}']")


def finished(page, *models: str) -> None:
    for model in models:
        expect(page.locator(f".answer[data-model='{model}'][data-state=done]")).to_have_count(1, timeout=LIMIT_MS)


def words(locator) -> str:
    """The text of the tokens, without the mark at the end."""
    return "".join(locator.locator(".token:not(.end)").all_text_contents())
