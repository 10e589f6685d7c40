"""A service over HTTP that scores: how it is asked, what is tried again, and that its token is told nowhere."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from actors.http_reward import HTTPReward
from actors.rewards import RewardSettings, check_reward
from corpus.problems import RunProblem, UsageProblem

pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://", "should name a host"),
        ("http:///score", "should name a host"),
        ("http://localhost:0", "should name a host"),
        ("http://localhost:99999", "no web address"),
        ("ftp://localhost", "should begin with http"),
    ],
)
def test_an_address_without_a_host_or_with_an_impossible_port_is_refused(url, says):
    with pytest.raises(UsageProblem, match=says):
        HTTPReward(url, 1, 1.0, 1.0)


@contextmanager
def served(answer):
    """A server that gives the (status, text) that `answer` makes of a request's body and Authorization header. Yields
    its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = answer(body, self.headers.get("Authorization", "nothing"))
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def service(*answers):
    """A server that gives the answers (status, body) in turn, the last for ever. Yields its address and requests."""
    requests = []

    def answer(body, _):
        requests.append(body)
        status, text = answers[min(len(requests), len(answers)) - 1]
        return status, text if isinstance(text, str) else text(body)

    with served(answer) as url:
        yield url, requests


def lengths(body):
    return json.dumps({"scores": [len(text) for text in body["responses"]]})


def test_a_service_is_asked_in_batches_and_answers_in_order():
    with service((200, lengths)) as (url, requests):
        scores = HTTPReward(url, 2, timeout_s=5, deadline_s=5).score(["p"] * 3, ["a", "bb", "ccc"], [], [])
    assert scores == [1, 2, 3]
    assert requests[0] == {"prompts": ["p", "p"], "responses": ["a", "bb"]}


def test_a_service_that_is_briefly_down_is_asked_again():
    with service((503, "starting"), (200, lengths)) as (url, requests):
        assert HTTPReward(url, 8, timeout_s=5, deadline_s=5).score(["p"], ["abc"], [], []) == [3]
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (500, "broken", r"no scores within 0\.1 s; at last, it answered 500 'broken'"),
        (404, "no such page", "it answered 404 'no such page'"),
        (200, "hello", "not JSON with a list"),
        (200, '{"rewards": [1]}', "not JSON with a list"),
        (200, '{"scores": [1, 2]}', "returned 2 scores for 1 responses"),
        (200, '{"scores": [NaN]}', "response 0 of 1 is nan"),
    ],
)
def test_a_service_that_answers_wrongly_ends_the_run_naming_it(status, answer, message):
    with (
        service((status, answer)) as (url, requests),
        pytest.raises(RunProblem, match=f"reward service {url}: .*{message}"),
    ):
        HTTPReward(url, 8, timeout_s=5, deadline_s=0.1).score(["p"], ["a"], [], [])
    assert len(requests) == 1


def test_a_service_that_is_not_there_or_never_answers_meets_the_deadline():
    with service((200, lengths)) as (url, _):
        pass
    with pytest.raises(RunProblem, match=r"no scores within 0\.1 s; at last, ConnectError"):
        HTTPReward(url, 8, timeout_s=5, deadline_s=0.1).score(["p"], ["a"], [], [])
    released = threading.Event()
    with service((200, lambda body: lengths(body) if released.wait(5) else "")) as (url, _):
        with pytest.raises(RunProblem, match="at last, ReadTimeout"):
            HTTPReward(url, 8, timeout_s=0.05, deadline_s=0.1).score(["p"], ["a"], [], [])
        released.set()


def guarded(token):
    """A service that scores for whoever has the token, and repeats to others what they sent."""

    def answer(body, sent):
        return (200, lengths(body)) if sent == f"Bearer {token}" else (401, f"not for {sent}")

    return served(answer)


def test_a_token_of_the_environment_is_sent_and_told_nowhere(monkeypatch):
    def asked(variable=None):
        return HTTPReward(url, 8, 5, 5, variable).score(["p"], ["ab"], [], [])

    with guarded("zq7-right-token") as url:
        monkeypatch.setenv("REWARD_TOKEN", "zq7-right-token\n")
        assert asked("REWARD_TOKEN") == [2]
        monkeypatch.setenv("REWARD_TOKEN", "zq7-wrong-token")
        with pytest.raises(RunProblem, match=r"it answered 401 'not for Bearer …'\.$"):
            asked("REWARD_TOKEN")
        with pytest.raises(RunProblem, match="not for nothing"):
            asked()


@pytest.mark.parametrize(
    ("value", "says"), [("", "has no REWARD_TOKEN"), ("zq7 canary", "has blanks"), ("zq7-é", "has blanks or no ASCII")]
)
def test_a_token_that_is_not_there_or_cannot_be_one_is_a_usage_problem(monkeypatch, value, says):
    monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UsageProblem, match=says) as caught:
        check_reward(RewardSettings(kind="http", url="http://127.0.0.1:9/score", token_variable="REWARD_TOKEN"))
    assert "zq7" not in str(caught.value)


def test_an_address_that_is_none_is_a_usage_problem():
    with pytest.raises(UsageProblem, match="http:// or https://"):
        HTTPReward("ftp://host/score", 8, 1, 1)
