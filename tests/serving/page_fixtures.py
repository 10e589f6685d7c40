"""Fixtures of a plugin: headless Chromium, driven by Playwright, before a stand-in for the service."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from playwright.sync_api import sync_playwright

from serving.page.run_view import PageRun
from tests.serving.page_stand_in import OPERATOR, StandIn, application, made_up_run
from tests.serving.page_visits import CHROMIUM, LIMIT_MS, WATCH, Server, is_a_mistake, log_in, wait_for


@dataclass
class Seen:
    """What a page did beside what the test looks at."""

    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PageRun:
    made = made_up_run(tmp_path_factory.mktemp("run"))
    made.warm()  # transformers takes many seconds to be imported, which no visit should wait for
    return made


@pytest.fixture
def server(run: PageRun) -> Iterator[Server]:
    service = StandIn()
    config = uvicorn.Config(application(run, service), port=0, log_level="warning", timeout_graceful_shutdown=2)
    served = uvicorn.Server(config)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    wait_for(lambda: served.started, "the stand-in to listen")
    port = served.servers[0].sockets[0].getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", service)
    served.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive(), "the stand-in did not end within 10 s"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as player:
        opened = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server: Server) -> Iterator[Callable]:
    """Opens the page: `visit(path, token, **options of the context)`. At the end of a test no page has run what a model
    wrote, tripped its content security policy, loaded anything from elsewhere or made a mistake."""
    pages: list[tuple] = []
    contexts: list = []

    def open_page(path: str = "/", token: str | None = OPERATOR, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(LIMIT_MS)
        context.add_init_script(WATCH)
        contexts.append(context)
        page = context.new_page()
        seen = Seen()
        pages.append((page, seen))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda message: seen.errors.append(message.text) if is_a_mistake(message) else None)
        page.on("request", lambda request: seen.urls.append(request.url))
        page.on("dialog", lambda dialog: seen.errors.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.goto(server.url + path)
        if token is not None:
            log_in(page, token)
        return page

    yield open_page
    for page, seen in pages:
        assert seen.errors == []
        assert [url for url in seen.urls if not url.startswith(server.url)] == []
        assert [url for url in seen.urls if "secret" in url] == []
        assert page.evaluate("() => [window.canary === undefined, window.violations]") == [True, []]
    for context in contexts:
        context.close()
