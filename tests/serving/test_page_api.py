"""The page's routes: who may, what is sent with what headers, and the sentence for everything that is refused."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from fastapi.testclient import TestClient

from corpus.problems import UsageProblem
from corpus.schemas import read_table
from serving.application import Replica
from serving.page import run_view
from serving.page import store as page_store
from serving.page.api import CONTENT_SECURITY_POLICY, PAGE_ROUTES, STATIC_FILES
from serving.page.backend import CSRF_HEADER, SESSION_COOKIE, Visitor, Wish
from serving.page.run_view import PageRun
from serving.served_run import ServedRun
from tests.serving.page_stand_in import COMPARISON, OPERATOR, READER, StandIn, application, made_up_run, write_metrics

STATIC = Path("serving/page/static")
READ_ROUTES = [path for method, path in PAGE_ROUTES if method == "GET" and path not in ("/", "/page/session")][1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PageRun:
    return made_up_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def service() -> StandIn:
    return StandIn()


@pytest.fixture
def client(run: PageRun, service: StandIn) -> Iterator[TestClient]:
    with TestClient(application(run, service)) as client:
        yield client


def logged_in(client: TestClient, token: str = OPERATOR) -> dict[str, str]:
    """The CSRF header of a new session, whose cookie the client keeps."""
    answer = client.post("/page/login", json={"token": token})
    assert answer.status_code == 200
    return {CSRF_HEADER: answer.json()["visitor"]["csrf"]}


def refusal(answer: Any) -> tuple[int, str]:
    """Status and code of a refused request, whose error has OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return answer.status_code, error["code"]


def test_the_router_answers_exactly_the_routes_that_it_lists(run: PageRun, service: StandIn):
    app = application(run, service)
    found = {(method, route.path) for route in app.router.routes for method in getattr(route, "methods", ())}
    found |= {
        (method, route.path)
        for included in app.router.routes
        for route in getattr(getattr(included, "original_router", None), "routes", ())
        for method in route.methods
    }
    assert found - {("POST", "/v1/completions"), ("POST", "/v1/score")} == set(PAGE_ROUTES)


def test_the_page_and_its_files_need_no_login_and_carry_the_policy(client: TestClient):
    for path in ("/", *(f"/page/static/{name}" for name in STATIC_FILES)):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page/static/page.js").headers["content-type"].startswith("text/javascript")


def test_every_file_of_the_page_is_listed():
    assert {path.name for path in STATIC.iterdir()} == {*STATIC_FILES, "index.html"}


@pytest.mark.parametrize("name", ["index.html", "..%2fapi.py", "%2e%2e/api.py", "api.py", "page.js/", "nothing.js"])
def test_no_other_file_is_served(client: TestClient, name: str):
    assert client.get(f"/page/static/{name}", follow_redirects=False).status_code in (307, 404)
    assert "APIRouter" not in client.get(f"/page/static/{name}").text


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert set(re.findall(r'(?:src|href)="([^"#]+)', page)) == {
        "/page/static/page.js",
        "/page/static/page.css",
        "/page/static/icon.svg",
    }
    for script in STATIC.glob("*.js"):
        text = script.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            script
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), script
        assert not re.search(r"setTimeout\(\s*[\"'`]", text), script


def test_a_file_that_somebody_else_writes_just_now_is_no_fault_of_the_request(
    client: TestClient, service: StandIn, monkeypatch: pytest.MonkeyPatch
):
    async def held(*_: Any) -> Any:
        raise UsageProblem("The lock of desired.json was not free for 15 s.", "storage/locked")

    monkeypatch.setattr(service, "want", held)
    answer = client.post("/page/desired", json={"pinned": None, "seen": 0}, headers=logged_in(client))
    assert refusal(answer) == (503, "busy")


@pytest.mark.parametrize("path", READ_ROUTES)
def test_without_a_login_nothing_of_the_run_is_told(client: TestClient, path: str):
    answer = client.get(path.format(name="0" * 24))
    assert refusal(answer) == (401, "invalid_token")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/page/session").json() == {"visitor": None, "run": None, "synthetic": False}


def test_the_login_gives_a_cookie_that_no_script_and_no_other_site_has(client: TestClient):
    assert refusal(client.post("/page/login", json={"token": "guess"})) == (401, "invalid_token")
    assert SESSION_COOKIE not in client.cookies
    answer = client.post("/page/login", json={"token": READER})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert READER not in answer.text + cookie
    again = client.get("/page/session").json()
    assert again["visitor"] == answer.json()["visitor"]
    assert (again["run"], again["synthetic"]) == ("made-up", True)
    for path in READ_ROUTES:
        assert client.get(path.format(name="0" * 24)).status_code in (200, 404), path


def test_the_cookie_is_for_https_alone_where_the_page_came_by_https(run: PageRun, service: StandIn):
    for scheme, secure in (("https", True), ("http", False)):
        with TestClient(application(run, service), base_url=f"{scheme}://testserver") as client:
            answer = client.post("/page/login", json={"token": READER})
            assert ("secure" in answer.headers["set-cookie"].lower()) is secure


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/page/comparisons", COMPARISON),
        ("/page/tokens", {"prompt": "hello"}),
        ("/page/desired", {"pinned": None, "seen": 0}),
        ("/page/logout", {}),
    ],
)
def test_a_session_changes_nothing_without_its_csrf_token(
    client: TestClient, service: StandIn, path: str, body: dict[str, Any]
):
    headers = logged_in(client)
    for wrong in ({}, {CSRF_HEADER: "guess"}, {CSRF_HEADER: ""}):
        assert refusal(client.post(path, json=body, headers=wrong)) == (403, "invalid_csrf")
    assert (service.wish.counter, len(service.sessions)) == (0, 1)
    assert client.post(path, json=body, headers=headers).status_code in (200, 201)


def test_logging_out_ends_the_session_on_the_service_too(client: TestClient):
    headers = logged_in(client)
    cookie = client.cookies[SESSION_COOKIE]
    assert client.post("/page/logout", json={}, headers=headers).json()["visitor"] is None
    assert SESSION_COOKIE not in client.cookies
    client.cookies[SESSION_COOKIE] = cookie
    assert client.get("/page/history").status_code == 401


def test_a_form_of_another_site_is_refused(client: TestClient):
    headers = logged_in(client)
    sent = client.post(
        "/page/desired", content=b'{"pinned":null,"seen":0}', headers={**headers, "content-type": "text/plain"}
    )
    assert refusal(sent) == (415, "not_json")
    assert refusal(client.post("/page/login", data={"token": OPERATOR})) == (415, "not_json")


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("/page/login", b"{", (400, "invalid_body")),
        ("/page/login", b'{"token": 5}', (400, "invalid_body")),
        ("/page/login", b'{"token": "' + b"x" * 5000 + b'"}', (413, "too_large")),
        ("/page/tokens", b'{"prompt": ""}', (400, "invalid_body")),
        ("/page/tokens", b'{"prompt": "\\ud800"}', (400, "invalid_body")),
        ("/page/tokens", b"\xff\xfe", (400, "invalid_body")),
        ("/page/comparisons", b'{"prompt": "' + b"x" * (1 << 20) + b'"}', (413, "too_large")),
        ("/page/comparisons", b"[[]]", (400, "not_possible")),
        ("/page/desired", b'{"pinned": "policy@40"}', (400, "invalid_body")),
        ("/page/desired", b'{"pinned": "../../etc", "seen": 0}', (400, "not_possible")),
    ],
)
def test_a_body_that_cannot_be_used_is_told_and_not_repeated(
    client: TestClient, path: str, content: bytes, expected: tuple[int, str]
):
    headers = {**logged_in(client), "content-type": "application/json"}
    answer = client.post(path, content=content, headers=headers)
    assert refusal(answer) == expected
    assert "xxxx" not in answer.text


def test_a_run_that_keeps_as_many_as_it_may_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    headers = logged_in(client)
    assert client.post("/page/comparisons", json=COMPARISON, headers=headers).status_code == 201
    monkeypatch.setattr(page_store, "MAX_STORED", 1)
    assert refusal(client.post("/page/comparisons", json=COMPARISON, headers=headers)) == (400, "not_possible")


def test_a_prompt_is_encoded_by_the_template_of_the_run(client: TestClient, run: PageRun):
    headers = logged_in(client)
    tokens = client.post("/page/tokens", json={"prompt": "hi"}, headers=headers).json()["tokens"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.directory / "data" / "tokenizer")
    assert tokenizer.decode(tokens) == "question : hi answer :"
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = client.post("/page/tokens", json={"prompt": dialogue}, headers=headers).json()["tokens"]
    assert tokenizer.decode(turns) == "".join(f"question : {turn} answer :" for turn in "abc")


def test_prompts_are_those_of_the_file(client: TestClient, run: PageRun, tmp_path: Path):
    logged_in(client)
    found = client.get("/page/prompts").json()
    table = read_table(run.directory / "data" / "prompts-heldout.parquet", "prompts")
    assert [one["prompt"] for one in found["prompts"]] == table["prompt"].to_pylist()
    assert found["total"] == 5


def test_curves_are_read_anew_while_the_run_goes_on_and_a_run_that_has_begun_has_none(tmp_path: Path, service: StandIn):
    service.open = True
    with TestClient(application(PageRun(tmp_path, "new"), service)) as client:
        assert client.get("/page/curves").json() == {"stages": []}
        assert client.get("/page/prompts").json() == {"total": 0, "prompts": []}
        write_metrics(tmp_path, 10)
        ppo, rm = client.get("/page/curves").json()["stages"]
        assert (ppo["name"], ppo["x"], ppo["finished"]) == ("round-01/ppo", "update", False)
        assert (rm["name"], rm["finished"]) == ("round-01/rm", True)
        score = ppo["panels"][0]["curves"][0]
        assert score["x"] == list(range(1, 11))
        lines = (tmp_path / "round-01/ppo/metrics.jsonl").read_text().splitlines()
        assert score["y"] == [json.loads(line)["objective/scores"] for line in lines]
        write_metrics(tmp_path, 700)
        longer = client.get("/page/curves").json()["stages"][0]["panels"][0]["curves"][0]
        assert len(longer["x"]) == 120
        (tmp_path / "round-01/ppo/metrics.jsonl").write_text("{}\n")
        assert refusal(client.get("/page/curves")) == (400, "not_possible")


def test_what_a_visit_begins_with_is_not_read_again_once_it_is_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoTokenizer

    run, cold = made_up_run(tmp_path), PageRun(tmp_path, "cold")
    run.warm()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a visitor waits for this")

    monkeypatch.setattr(run_view, "read_table", refuse)
    monkeypatch.setattr(run_view, "read_metrics", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    for begin in (lambda of: of.prompts(), lambda of: of.curves(), lambda of: of.encode("hi")):
        asyncio.run(begin(run))
        with pytest.raises(AssertionError):
            asyncio.run(begin(cold))


def test_a_replica_reads_it_before_it_is_ready_and_serves_without_what_is_damaged(tmp_path: Path, caplog: Any):
    made_up_run(tmp_path)
    replica: Any = SimpleNamespace(_run=ServedRun(tmp_path, tmp_path, None))
    with patch.object(PageRun, "warm", autospec=True) as warm:
        assert asyncio.run(Replica._page(replica)).routes
    [call] = warm.call_args_list
    assert call.args[0].directory == tmp_path
    (tmp_path / "data" / "prompts-heldout.parquet").write_bytes(b"no table")
    assert asyncio.run(Replica._page(replica)).routes
    assert "the page will lack something" in caplog.text
    assert "prompts-heldout.parquet" in caplog.text


def test_the_policy_is_held_by_those_who_operate_and_by_compare_and_set(client: TestClient, service: StandIn):
    reader = logged_in(client, READER)
    hold = {"pinned": "policy@40", "seen": 0}
    assert refusal(client.post("/page/desired", json=hold, headers=reader)) == (403, "missing_scope")
    operator = logged_in(client)
    assert client.post("/page/desired", json=hold, headers=operator).json()["pinned"] == "policy@40"
    answer = client.post("/page/desired", json={"pinned": None, "seen": 0}, headers=operator)
    assert refusal(answer) == (409, "changed_meanwhile")
    assert "ann has changed this" in answer.json()["error"]["message"]
    assert isinstance(service.wish, Wish)
    assert client.get("/page/models").json()["wish"] == service.wish.model_dump()


def test_a_bearer_token_does_for_programs(client: TestClient):
    headers = {"authorization": f"Bearer {READER}"}
    kept = client.post("/page/comparisons", json=COMPARISON, headers=headers)
    assert kept.status_code == 201
    assert kept.json()["who"] == "bob"
    found = client.get(f"/page/comparisons/{kept.json()['id']}", headers=headers).json()
    assert {key: found[key] for key in COMPARISON} == COMPARISON
    listed = client.get("/page/history", headers=headers).json()["comparisons"]
    assert listed[0]["id"] == kept.json()["id"]
    assert refusal(client.get(f"/page/comparisons/{'0' * 24}", headers=headers)) == (404, "not_found")


def test_visitors_say_what_they_may(client: TestClient, service: StandIn):
    service.open = True
    visitor = Visitor.model_validate(client.get("/page/session").json()["visitor"])
    assert (visitor.login, visitor.csrf) == (False, None)
    assert visitor.scopes == {"read", "score", "operate"}
