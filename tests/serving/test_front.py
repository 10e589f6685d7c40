"""HAProxy before the replicas: Ray's own configuration hardened, and run by HAProxy itself before a server that says
who it is told asks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from corpus.problems import UsageProblem
from serving import front
from serving.front import BINARY, ENABLED, PROGRAM, STARTED_BY_RAY, check_guarded, fronted, hardened, why_not

needs_haproxy = pytest.mark.skipif(front._binary() is None, reason="there is no HAProxy for this platform")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in (ENABLED, STARTED_BY_RAY, BINARY):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rays(directory: Path, port: int, replica: int, stats: int = 1, metrics: int = 2) -> str:
    """The configuration that Ray writes for a service on `port` with a replica behind it."""
    from ray.serve._private.common import RequestProtocol
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        stats_port=stats,
        metrics_port=metrics,
        socket_path=str(directory / "s" / "admin.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "state"),
        is_head=True,
        has_received_routes=True,
    )
    servers = [ServerConfig(name="replica", host="127.0.0.1", port=replica)]
    backend = BackendConfig(
        name="http-amenable", path_prefix="/", servers=servers, app_name="amenable", protocol=RequestProtocol.HTTP
    )
    file = directory / "haproxy.cfg"
    api = HAProxyApi(config, backend_configs={"http-amenable": backend}, config_file_path=str(file))
    api._generate_config_file_internal()
    return file.read_text()


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a name short enough for sockets."""
    path = Path("/tmp") / f"front-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_what_is_left_of_rays_configuration_opens_the_service_alone(directory):
    given = rays(directory, 8000, 30000)
    assert given.count("\n    bind ") + given.count("\n  bind ") == 3
    assert "mode 666" in given
    left = hardened(given)
    assert [line.strip() for line in left.splitlines() if line.split()[:1] == ["bind"]] == ["bind 127.0.0.1:8000"]
    assert [line for line in left.splitlines() if "stats socket" in line and "mode 600 level admin" in line]
    for gone in ("prometheus-exporter", "stats enable", "stats uri", "mode 666", "log 127.0.0.1"):
        assert gone in given, gone
        assert gone not in left, gone
    assert "server replica 127.0.0.1:30000 check" in left


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ("listen stats", "listen pages"),
        ("frontend prometheus", "frontend metrics"),
        ("frontend http_frontend", "frontend service"),
        ("mode 666", "mode 777"),
        ("frontend http_frontend", "listen other\n    bind :99\nfrontend http_frontend"),
        ("    stats timeout", "    stats socket /tmp/x mode 666\n    stats timeout"),
    ],
)
def test_a_configuration_that_is_not_as_expected_is_refused(directory, was, is_now):
    given = rays(directory, 8000, 30000)
    hardened(given)
    assert was in given
    with pytest.raises(ValueError, match="HAProxy's configuration"):
        hardened(given.replace(was, is_now, 1))


class Behind(BaseHTTPRequestHandler):
    """A replica that answers with the headers it is sent."""

    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def replica() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Behind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def answered(port: int, path: str = "/", **headers: str) -> bytes | None:
    """What is answered within ten seconds."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        with suppress(OSError):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
            return urllib.request.urlopen(request, timeout=5).read()
        time.sleep(0.1)
    return None


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


STARTER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
"""Starts a command and stays, as Ray's actor does with HAProxy."""


@needs_haproxy
def test_haproxy_tells_the_replica_who_asks_opens_nothing_else_and_ends_with_who_started_it(
    directory, replica, monkeypatch
):
    port, stats, metrics = free_port(), free_port(), free_port()
    monkeypatch.setenv(BINARY, str(front._binary()))
    rays(directory, port, replica, stats, metrics)
    told = {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "https"}
    command = [str(front._program(directory)), "-db", "-f", str(directory / "haproxy.cfg")]
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *command])
    try:
        found = json.loads(answered(port, **told) or b"null")
        assert found["x-forwarded-for"] == "127.0.0.1"
        assert "x-forwarded-proto" not in found
        assert not listens(stats)
        assert not listens(metrics)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait(10)
    give_up = time.monotonic() + 10
    while listens(port):
        assert time.monotonic() < give_up, "HAProxy outlived the process that started it"
        time.sleep(0.1)


@needs_haproxy
def test_rays_configuration_as_it_is_opens_more_and_takes_the_senders_word(directory, replica):
    """The negative control of the test above."""
    port, stats, metrics = free_port(), free_port(), free_port()
    rays(directory, port, replica, stats, metrics)
    proxy = subprocess.Popen([str(front._binary()), "-db", "-f", str(directory / "haproxy.cfg")])
    try:
        found = json.loads(answered(port, **{"X-Forwarded-For": "10.1.2.3"}) or b"null")
        assert found["x-forwarded-for"] == "10.1.2.3"
        assert listens(stats)
        assert listens(metrics)
    finally:
        proxy.kill()
        proxy.wait(10)


@pytest.mark.parametrize("arguments", [[], ["-f"], ["-v"], ["-f", "a", "-f", "b"]])
def test_the_program_takes_one_configuration(arguments, directory):
    done = subprocess.run(
        [front._program(directory), *arguments],
        env={**os.environ, BINARY: "/bin/true"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "takes one -f FILE" in done.stderr


def test_a_refused_configuration_starts_nothing(directory):
    (directory / "haproxy.cfg").write_text("global\nlisten all\n    bind :1\n")
    done = subprocess.run(
        [front._program(directory), "-f", directory / "haproxy.cfg"],
        env={**os.environ, BINARY: "/bin/true"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, "opens listen all" in done.stderr) == (1, True)


def test_why_there_is_no_haproxy_is_said(monkeypatch, tmp_path):
    assert why_not("10.0.0.7") == "HAProxy needs --host 127.0.0.1 or 0.0.0.0"
    monkeypatch.setenv(BINARY, str(tmp_path / "none"))
    assert "does not run here" in str(why_not("127.0.0.1"))
    monkeypatch.setenv(BINARY, "/bin/true")
    assert why_not("127.0.0.1") is None
    monkeypatch.setenv(ENABLED, "0")
    assert why_not("127.0.0.1") == f"{ENABLED} is 0"
    monkeypatch.delenv(ENABLED)
    monkeypatch.delenv(BINARY)
    monkeypatch.setattr(front, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no HAProxy" in str(why_not("127.0.0.1"))


def test_without_haproxy_ray_is_told_so(monkeypatch):
    with fronted("10.0.0.7") as reason:
        assert reason is not None
        assert os.environ[ENABLED] == "0"
    assert ENABLED not in os.environ


def test_each_service_has_files_of_its_own_which_are_its_users_alone(monkeypatch):
    monkeypatch.setenv(BINARY, "/bin/true")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "3")
    with fronted("127.0.0.1") as reason:
        assert reason is None
        program = Path(os.environ[STARTED_BY_RAY])
        assert program.name == PROGRAM
        assert program.parent.stat().st_mode & 0o777 == 0o700
        assert Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent == program.parent
        assert (os.environ[ENABLED], os.environ["RAY_SERVE_HAPROXY_NBTHREAD"]) == ("1", "3")
        check_guarded()
        first = os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]
    assert not program.parent.exists()
    assert {ENABLED, STARTED_BY_RAY, "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"}.isdisjoint(os.environ)
    with fronted("127.0.0.1"):
        assert os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] != first
        assert Path(os.environ[STARTED_BY_RAY]) != program


def test_a_haproxy_of_the_persons_own_is_hardened_too(monkeypatch):
    monkeypatch.setenv(STARTED_BY_RAY, "/bin/true")
    with fronted("127.0.0.1") as reason:
        assert reason is None
        assert os.environ[BINARY] == "/bin/true"
        assert Path(os.environ[STARTED_BY_RAY]).name == PROGRAM
    assert os.environ[STARTED_BY_RAY] == "/bin/true"


def test_a_service_without_tokens_refuses_a_haproxy_that_hides_who_asks(monkeypatch):
    check_guarded()
    monkeypatch.setenv(ENABLED, "1")
    for binary in (None, "/usr/sbin/haproxy"):
        if binary is not None:
            monkeypatch.setenv(STARTED_BY_RAY, binary)
        with pytest.raises(UsageProblem, match="who asks"):
            check_guarded()
    monkeypatch.setenv(STARTED_BY_RAY, f"/opt/amenable/bin/{PROGRAM}")
    check_guarded()
