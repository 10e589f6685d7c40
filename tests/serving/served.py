"""`amenable serve` as a process of its own, for tests."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from serving.access import new_token
from serving.desired import Place, read_reports
from serving.front import ENABLED
from tests.serving.run_on_disk import alive, descendants, publish, write_run

ALL = frozenset({"read", "score", "operate"})
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Service:
    """A running `amenable serve`."""

    run: Place
    port: int
    token: str
    logs: Path
    process: subprocess.Popen[bytes]
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, retries: int = 20) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=retries, timeout=120)

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        given = {"Authorization": f"Bearer {token or self.token}", "Content-Type": "application/json", **headers}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def answers_http(self, port: int) -> bool:
        """Whether a port of this machine answers the service's health in HTTP."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as response:
                return response.status == 200 and response.read() == b'{"status": "ok"}'  # not any page of Ray's
        except (OSError, http.client.HTTPException):
            return False

    def replica(self) -> int:
        """The process of the one replica."""
        [name] = read_reports(self.run)
        return int(name.rpartition("-")[2])

    def serves(self, model: str) -> str | None:
        """The version of a model that the replica says it holds."""
        for says in read_reports(self.run).values():
            for slot in says["slots"]:
                if slot["model"] == model:
                    return slot["version"]
        return None


class Asking:
    """A client that asks `policy` again and again, and never tries again by itself."""

    def __init__(self, service: Service, prompt: list[int]) -> None:
        self.versions: list[str] = []
        self._prompt = prompt
        self._over = threading.Event()
        self._running = ThreadPoolExecutor(1).submit(self._ask, service)

    def _ask(self, service: Service) -> None:
        client = service.client(0)
        while not self._over.wait(0.02):
            found = client.completions.create(model="policy", prompt=self._prompt, max_tokens=5)
            self.versions += [span["version"] for span in found.model_dump()["amenable"]["versions"]]

    def stop(self) -> None:
        """Raises what the client met."""
        self._over.set()
        self._running.result(60)


def until(condition: Callable[[], Any], what: str, deadline_s: float = 120.0) -> Any:
    give_up = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < give_up, f"{what} did not happen within {deadline_s:.0f} s"
        time.sleep(0.05)
    return found


@contextmanager
def serving(directory: Path, host: str = "127.0.0.1", **settings: Any) -> Iterator[Service]:
    """The command for the block, on a toy run in `directory` with one published version; settings are those of the
    recipe's `serving`. It is asked to end, and afterwards nothing of it is left."""
    run = write_run(directory / "run", kv_cache_mib=16, max_concurrent=32, follow_s=0.1, **settings)
    publish(run, 1, seed=21)
    with serve(run, directory, host) as service:
        yield service


@contextmanager
def serve(run: Place, directory: Path, host: str = "127.0.0.1") -> Iterator[Service]:
    """The command for the block, on `run`, a directory or an address; tokens and logs lie in `directory`. It listens on
    `host`, by which 127.0.0.1 is meant too. It is asked to end, and afterwards nothing of it is left."""
    file = directory / "tokens.json"
    tokens = {scope: new_token(file, scope, frozenset({scope})) for scope in ("read", "score", "operate")}  # pyright: ignore
    token = new_token(file, "all", ALL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = directory / "logs"
    logs.mkdir()
    (directory / "home").mkdir()
    environment = {**os.environ, "RAY_TMPDIR": "/tmp", "HOME": str(directory / "home"), "OMP_NUM_THREADS": "1"}
    with open(logs / "command", "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "amenable",
                "serve",
                str(run),
                "--host",
                host,
                "--port",
                str(port),
                "--token-file",
                str(file),
                "--json",
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert process.stdout is not None
        said = b""
        while not said.rstrip().endswith(b"}"):
            line = process.stdout.readline()
            assert line, (logs / "command").read_text()[-4000:]
            said += line
        answer = json.loads(said)
        assert answer.get("url") == f"http://{host}:{port}", answer
        assert answer["no_haproxy"] == (f"{ENABLED} is 0" if os.environ.get(ENABLED) == "0" else None)
        service = Service(run, port, token, logs, process, tokens)
        yield service
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (logs / "command").read_text()[-4000:]
        until(lambda: not any(alive(pid) for pid in below), "the end of all processes", 30)
