"""What the Hub tells of a data set, asked over HTTP of a stand-in that answers as the Hub does."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from corpus.hub import name_and_split

ROOT = Path(__file__).parents[2]
CARDS = {
    "one/licence": {"license": "cc-by-4.0"},
    "two/licences": {"license": ["mit", "apache-2.0"]},
    "own/licence": {"license": "other", "license_name": "house-licence"},
    "no/licence": {"pretty_name": "Texts"},
    "no/card": None,
}
ASK = "import json, sys; from corpus.hub import hub_card; print(json.dumps(vars(hub_card(sys.argv[1]))))"


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = re.sub("^/api/(datasets|models)/", "", self.path).partition("?")[0]
            told = {"id": name, "sha": "c0ffee" * 6, "cardData": CARDS.get(name), "tags": [], "siblings": []}
            body = json.dumps(told if name in CARDS else {"error": "Repository not found"}).encode()
            self.send_response(200 if name in CARDS else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


ASK_COMMIT = "import json, sys; from corpus.hub import model_commit; print(json.dumps(model_commit(sys.argv[1])))"


def card(name: str, endpoint: str, ask: str = ASK, **environment: str) -> Any:
    """What `hub_card` says in a process whose Hub is at `endpoint`; or what else `ask` asks."""
    ended = subprocess.run(
        [sys.executable, "-c", ask, name],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": endpoint} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("one/licence", "cc-by-4.0"),
        ("two/licences", "mit, apache-2.0"),
        ("own/licence", "house-licence"),
        ("no/licence", None),
        ("no/card", None),
    ],
)
def test_the_card_tells_the_licence_and_the_hub_the_commit(hub: str, name: str, licence: str | None):
    assert card(name, hub) == {"commit": "c0ffee" * 6, "licence": licence, "why": ""}


def test_a_data_set_that_the_hub_does_not_tell_of_has_nothing_but_the_reason(hub: str):
    for found in (
        card("nobody/knows", hub),
        card("one/licence", "http://127.0.0.1:9"),
        card("one/licence", hub, HF_HUB_OFFLINE="1"),
    ):
        assert (found["commit"], found["licence"]) == (None, None)
        assert found["why"]


def test_a_model_has_the_commit_that_the_hub_tells_or_that_of_the_copy_in_the_cache(hub: str, tmp_path: Path):
    environment = {"HF_HUB_CACHE": str(tmp_path)}
    assert card("one/licence", hub, ASK_COMMIT, **environment) == "c0ffee" * 6
    assert card("one/licence", "http://127.0.0.1:9", ASK_COMMIT, **environment) is None
    (tmp_path / "models--one--licence" / "refs").mkdir(parents=True)
    (tmp_path / "models--one--licence" / "refs" / "main").write_text("decade")
    assert card("one/licence", "http://127.0.0.1:9", ASK_COMMIT, **environment) == "decade"
    assert card("one/licence", hub, ASK_COMMIT, HF_HUB_OFFLINE="1", **environment) == "decade"
    assert card("one/licence", hub, ASK_COMMIT, **environment) == "c0ffee" * 6


def test_an_address_names_a_data_set_and_a_split():
    assert name_and_split("hub:some/data") == ("some/data", "train")
    assert name_and_split("hub:some/data:test") == ("some/data", "test")
