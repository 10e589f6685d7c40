"""HAProxy before the replicas: Ray's own configuration hardened, and run by HAProxy itself before a server that says
who it is told asks."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from corpus.problems import UsageProblem
from serving import front
from serving.errors import ApiError
from serving.front import (
    BELIEVED,
    BINARY,
    ENABLED,
    HOST,
    PROGRAM,
    STARTED_BY_RAY,
    check_guarded,
    fronted,
    hardened,
    why_not,
    write_answers,
)

needs_haproxy = pytest.mark.skipif(front._binary() is None, reason="there is no HAProxy for this platform")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in (ENABLED, STARTED_BY_RAY, BINARY, HOST, BELIEVED):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rays(directory: Path, port: int, replica: int | None, stats: int = 1, metrics: int = 2) -> str:
    """The configuration that Ray writes for a service on `port` with a replica behind it, or with no application."""
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
    backends = {}
    if replica is not None:
        servers = [ServerConfig(name="replica", host="127.0.0.1", port=replica)]
        backends["http-amenable"] = BackendConfig(
            name="http-amenable", path_prefix="/", servers=servers, app_name="amenable", protocol=RequestProtocol.HTTP
        )
    file = directory / "haproxy.cfg"
    api = HAProxyApi(config, backend_configs=backends, config_file_path=str(file))
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
    left = hardened(given, directory)
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
        ("\ndefaults\n", "\ndefaults of_all\n"),
        ("\nbackend default_backend", "\nbackend nowhere"),
        ("frontend http_frontend", "listen other\n    bind :99\nfrontend http_frontend"),
        ("    stats timeout", "    stats socket /tmp/x mode 666\n    stats timeout"),
    ],
)
def test_a_configuration_that_is_not_as_expected_is_refused(directory, was, is_now):
    given = rays(directory, 8000, 30000)
    hardened(given, directory)
    assert was in given
    with pytest.raises(ValueError, match="HAProxy's configuration"):
        hardened(given.replace(was, is_now, 1), directory)


class Behind(BaseHTTPRequestHandler):
    """A replica that answers with the headers it is sent; /slow after three seconds, /dies never, /flood for ever."""

    cut = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/dies":
            return
        if self.path == "/flood":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                self.cut.set()
            return
        if self.path == "/slow":
            time.sleep(3)
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def replica() -> Iterator[int]:
    Behind.cut.clear()
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


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == 0


STARTER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
"""Starts a command and stays, as Ray's actor does with HAProxy."""


@contextmanager
def proxied(directory: Path, port: int, config: str, host: str = "127.0.0.1") -> Iterator[None]:
    """HAProxy by this configuration, by which it listens on `port` of `host`."""
    write_answers(directory)
    (directory / "haproxy.cfg").write_text(config)
    proxy = subprocess.Popen([str(front._binary()), "-db", "-f", str(directory / "haproxy.cfg")])
    try:
        give_up = time.monotonic() + 10
        while not listens(port, host):
            assert time.monotonic() < give_up, "HAProxy does not listen"
            time.sleep(0.05)
        yield
    finally:
        proxy.kill()
        proxy.wait(10)


def asked(port: int, path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def said_to(port: int, *parts: bytes, pause_s: float = 0.0, deadline_s: float = 10.0) -> bytes:
    """The answer to raw bytes, as far as it comes within the deadline."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), deadline_s) as client, suppress(TimeoutError, OSError):
        client.settimeout(pause_s or deadline_s)
        for part in parts:
            client.sendall(part)
            if pause_s:
                with suppress(TimeoutError):
                    got += client.recv(4096)
            if got:
                break
        while data := client.recv(4096):
            got += data
    return got


RUBBISH = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: odd\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
]
"""What HAProxy's parser answers before any rule of a configuration is asked."""


def is_error(status: int, code: str, body: bytes) -> bool:
    error = json.loads(body)["error"]
    return error == json.loads(ApiError(status, code, error["message"]).body())["error"]


@needs_haproxy
def test_what_haproxy_answers_by_itself_has_openais_shape(directory, replica):
    port = free_port()
    with proxied(directory, port, hardened(rays(directory, port, replica), directory)):
        assert asked(port)[0] == 200
        status, headers, body = asked(port, "/dies")
        assert (status, headers["retry-after"], headers["content-type"]) == (503, "5", "application/json")
        assert is_error(503, "replica_lost", body)
        for rubbish in RUBBISH:
            assert said_to(port, rubbish).startswith(b"HTTP/1.1 400 "), rubbish[:60]
    with proxied(directory, port, hardened(rays(directory, port, free_port()), directory)):
        assert is_error(503, "replica_lost", asked(port)[2])
    with proxied(directory, port, hardened(rays(directory, port, None), directory)):
        status, _, body = asked(port)
        assert (status, is_error(503, "replica_lost", body)) == (503, True)
        odd = b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        head, _, body = said_to(port, odd).partition(b"\r\n\r\n")
        assert (head[:13], is_error(404, "not_found", body)) == (b"HTTP/1.1 404 ", True)


@needs_haproxy
def test_rays_configuration_as_it_is_answers_in_words_of_its_own(directory, replica):
    """The negative control of the test above."""
    port = free_port()
    with proxied(directory, port, rays(directory, port, replica, free_port(), free_port())):
        assert asked(port, "/dies")[0] == 500
    with proxied(directory, port, rays(directory, port, None, free_port(), free_port())):
        assert asked(port)[0] == 404


DRIPS = [b"GET / HTTP/1.1\r\n", *([b"a"] * 8)]


@needs_haproxy
def test_haproxy_waits_for_a_slow_answer_and_for_no_slow_client(directory, replica, monkeypatch):
    monkeypatch.setattr(front, "HEAD_S", 1)
    monkeypatch.setattr(front, "SILENT_S", 1)
    port = free_port()
    with proxied(directory, port, hardened(rays(directory, port, replica), directory)):
        assert asked(port, "/slow")[0] == 200
        assert said_to(port, *DRIPS, pause_s=0.5).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
            assert Behind.cut.wait(10), "a client that does not read holds its replica"


@needs_haproxy
def test_rays_configuration_as_it_is_waits_for_slow_clients(directory, replica):
    """The negative control of the test above."""
    port = free_port()
    with proxied(directory, port, rays(directory, port, replica, free_port(), free_port())):
        assert said_to(port, *DRIPS, pause_s=0.5) == b""
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not Behind.cut.wait(4)
        assert Behind.cut.wait(10)


@needs_haproxy
@pytest.mark.parametrize(("host", "given"), [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]"), ("0.0.0.0", "0.0.0.0")])
def test_haproxy_alone_listens_where_the_service_does(directory, replica, host, given):
    port = free_port()
    config = hardened(rays(directory, port, replica), directory, host)
    assert f"    bind {given}:{port}\n" in config
    if host != "127.0.0.2":  # the others are read alone: what they reach depends on the machine
        write_answers(directory)
        (directory / "haproxy.cfg").write_text(config)
        subprocess.run([str(front._binary()), "-c", "-f", str(directory / "haproxy.cfg")], check=True, timeout=30)
        return
    with proxied(directory, port, config, host):
        assert urllib.request.urlopen(f"http://{host}:{port}/", timeout=10).status == 200
        assert not listens(port), "it listens on 127.0.0.1 too"


@needs_haproxy
def test_haproxy_tells_the_replica_who_asks_opens_nothing_else_and_ends_with_who_started_it(
    directory, replica, monkeypatch
):
    port, stats, metrics = free_port(), free_port(), free_port()
    monkeypatch.setenv(BINARY, str(front._binary()))
    rays(directory, port, replica, stats, metrics)
    told = {"X-Forwarded-For": "10.1.2.3", "X-Forwarded-Proto": "https"}
    to_ray = ("X-Request-Id", "X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "X-Session-Id")
    to_ray += ("serve_multiplexed_model_id", "serve-multiplexed_model-id", "X-Session_Id", "X-Serve-Router-Any")
    told |= dict.fromkeys(to_ray, "\xff")
    command = [str(front._program(directory)), "-db", "-f", str(directory / "haproxy.cfg")]
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *command])
    try:
        found = json.loads(answered(port, **told) or b"null")
        assert found["x-forwarded-for"] == "10.1.2.3, 127.0.0.1"
        assert not {each.lower() for each in to_ray} & set(found)
        assert found["x-forwarded-proto"] == "https", "the cookie of a page behind TLS would not be for TLS alone"
        assert json.loads(answered(port) or b"null")["x-forwarded-for"] == "127.0.0.1"
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
def test_this_machine_has_one_name_by_which_replicas_know_it_whatever_address_it_asks_from(directory, replica):
    port = free_port()
    with proxied(directory, port, hardened(rays(directory, port, replica), directory, "::1"), "::1"):
        request = urllib.request.Request(f"http://[::1]:{port}/", headers={"X-Forwarded-For": "10.1.2.3"})
        found = json.load(urllib.request.urlopen(request, timeout=10))
        assert found["x-forwarded-for"] == "10.1.2.3, 127.0.0.1"


@needs_haproxy
def test_rays_configuration_as_it_is_opens_more_and_takes_the_senders_word(directory, replica):
    """The negative control of the test above."""
    port, stats, metrics = free_port(), free_port(), free_port()
    rays(directory, port, replica, stats, metrics)
    proxy = subprocess.Popen([str(front._binary()), "-db", "-f", str(directory / "haproxy.cfg")])
    try:
        found = json.loads(answered(port, **{"X-Forwarded-For": "10.1.2.3", "X-Request-Id": "1"}) or b"null")
        assert (found["x-forwarded-for"], found["x-request-id"]) == ("10.1.2.3", "1")
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
    monkeypatch.setenv(BINARY, str(tmp_path / "none"))
    assert "does not run here" in str(why_not())
    monkeypatch.setenv(BINARY, "/bin/true")
    assert why_not() is None
    monkeypatch.setenv(ENABLED, "0")
    assert why_not() == f"{ENABLED} is 0"
    monkeypatch.delenv(ENABLED)
    monkeypatch.delenv(BINARY)
    monkeypatch.setattr(front, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no HAProxy" in str(why_not())


def test_without_haproxy_ray_is_told_so(monkeypatch):
    monkeypatch.setenv(BINARY, "/bin/false")
    with fronted("10.0.0.7", 300.0) as reason:
        assert reason is not None
        assert os.environ[ENABLED] == "0"
    assert ENABLED not in os.environ


def test_each_service_has_files_of_its_own_which_are_its_users_alone(monkeypatch):
    monkeypatch.setenv(BINARY, "/bin/true")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "3")
    with fronted("10.0.0.7", 299.5) as reason:
        assert reason is None
        assert os.environ[HOST] == "10.0.0.7"
        assert os.environ["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "360"
        program = Path(os.environ[STARTED_BY_RAY])
        assert program.name == PROGRAM
        assert program.parent.stat().st_mode & 0o777 == 0o700
        assert Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent == program.parent
        assert (os.environ[ENABLED], os.environ["RAY_SERVE_HAPROXY_NBTHREAD"]) == ("1", "3")
        check_guarded()
        first = os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]
    assert not program.parent.exists()
    assert {ENABLED, STARTED_BY_RAY, HOST, "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"}.isdisjoint(os.environ)
    with fronted("127.0.0.1", 300.0):
        assert os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] != first
        assert Path(os.environ[STARTED_BY_RAY]) != program


def test_a_haproxy_of_the_persons_own_is_hardened_too(monkeypatch):
    monkeypatch.setenv(STARTED_BY_RAY, "/bin/true")
    with fronted("127.0.0.1", 300.0) as reason:
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
    for believed in ("*", "10.0.0.0/8", ""):
        monkeypatch.setenv(BELIEVED, believed)
        with pytest.raises(UsageProblem, match=f"{BELIEVED} is .* nobody else: unset it"):
            check_guarded()
    monkeypatch.setenv(BELIEVED, "127.0.0.1")
    check_guarded()


@pytest.mark.parametrize(
    ("told", "client"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.1, 10.0.0.9", "10.0.0.9"), ("10.1.2.3, 127.0.0.1", "10.1.2.3")],
)
def test_who_asks_is_the_last_in_the_header_that_is_not_this_machine(told, client):
    """What uvicorn, in which replicas are, makes of HAProxy's word behind the sender's."""
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    async def app(scope, receive, send) -> None:
        """Nothing."""

    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", told.encode())]}
    asyncio.run(ProxyHeadersMiddleware(app)(scope, None, None))  # pyright: ignore[reportArgumentType]
    assert scope["client"][0] == client
