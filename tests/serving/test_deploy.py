"""`serve deploy` with the config file that comes with the program, on a Ray head of its own: edits in place, and more
replicas where there is more to do."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from serving.access import new_token
from serving.desired import read_reports
from serving.front import fronted
from tests.serving.run_on_disk import alive, descendants, publish, write_run
from tests.serving.served import ALL, ROOT, until

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_ones:
        probes = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Head:
    """A Ray head that runs until it is ended, and what is deployed there. HAProxy is before the replicas, as in the
    image."""

    def __init__(self, directory: Path) -> None:
        self.run = write_run(directory / "run", kv_cache_mib=16, max_concurrent=32, follow_s=0.1, loaded=["policy"])
        publish(self.run, 1, seed=21)
        self._tokens = directory / "tokens.json"
        self._token = new_token(self._tokens, "all", ALL)
        gcs, dashboard, agent, client, self._port = free_ports(5)
        self._dashboard = f"http://127.0.0.1:{dashboard}"
        self._config = directory / "deploy.yaml"
        # The session's sockets have long names, which a test's directory would make too long.
        given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp"}
        self._environment = {**os.environ, **given, "RAY_USAGE_STATS_ENABLED": "0"}
        options = {
            "port": gcs,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "node-ip-address": "127.0.0.1",
            "num-cpus": 6,
            "object-store-memory": 128 << 20,
        }
        self._log = directory / "head.log"
        with open(self._log, "wb") as log:
            self._head = subprocess.Popen(
                [self._program("ray"), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self._answers, "an answer of the dashboard")

    def deploy(self, channel: str = "policy", **autoscaling: Any) -> None:
        """`serve deploy` of the program's own file, with this run, and bounds that a test can wait for."""
        content = yaml.safe_load((ROOT / "serving" / "deploy.yaml").read_text())
        content["http_options"]["port"] = self._port
        [application] = content["applications"]
        application["args"] |= {"run": str(self.run), "token_file": str(self._tokens)}
        [deployment] = application["deployments"]
        deployment["user_config"] = {"run": str(self.run), "channel": channel}
        deployment["autoscaling_config"] |= autoscaling
        self._config.write_text(yaml.safe_dump(content))
        done = subprocess.run(
            [self._program("serve"), "deploy", str(self._config), "--address", self._dashboard],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def version(self) -> str:
        """Which weights answer a request that names no model."""
        body = json.dumps({"prompt": "w5", "max_tokens": 1}).encode()
        given = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/v1/completions", body, given)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.headers["x-amenable-version"]

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self._port}/v1", api_key=self._token, max_retries=20, timeout=120)

    def has_haproxy(self) -> bool:
        return any(b"haproxy.cfg" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(self._head.pid))

    def end(self) -> None:
        below = descendants(self._head.pid)
        self._head.send_signal(signal.SIGTERM)
        self._head.wait(60)
        until(lambda: not any(alive(pid) for pid in below), "the end of all processes", 60)

    def said(self) -> str:
        return self._log.read_text()[-3000:]

    def _answers(self) -> bool:
        assert self._head.poll() is None, self.said()
        try:
            return urllib.request.urlopen(f"{self._dashboard}/api/version", timeout=5).status == 200
        except OSError:
            return False

    def _program(self, name: str) -> str:
        return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with fronted("127.0.0.1", 300.0) as reason:
        assert reason is None
        head = Head(tmp_path_factory.mktemp("head"))
        yield head
        head.end()


def replicas(head: Head) -> set[str]:
    return set(read_reports(head.run))


def test_it_is_deployed_and_another_channel_is_no_new_replica(head):
    head.deploy(max_replicas=1)
    [replica] = until(lambda: replicas(head), "the first replica", 300)
    assert until(lambda: answered(head), "an answer", 60) == "0.1"
    publish(head.run, 2, seed=22)
    until(lambda: answered(head) == "0.2", "the newest weights", 60)
    head.deploy("policy@1", max_replicas=1)
    until(lambda: answered(head) == "0.1", "the weights of the other channel", 120)
    assert replicas(head) == {replica}
    assert head.has_haproxy()


def test_more_clients_are_more_replicas_within_the_bounds(head):
    head.deploy(
        max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0.5, metrics_interval_s=0.5, look_back_period_s=1
    )
    until(lambda: answered(head) == "0.2", "the newest weights", 120)
    over = threading.Event()

    def ask(client: OpenAI) -> int:
        count = 0
        while not over.is_set():
            found = client.completions.create(
                model="policy", prompt=[5, 6], max_tokens=20, extra_body={"ignore_eos": True}
            )
            assert found.usage is not None
            assert found.usage.completion_tokens == 20
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, head.client()) for _ in range(6)]
        try:
            until(lambda: len(replicas(head)) == 2, "a second replica", 300)
        finally:
            over.set()
        assert all(each.result(120) > 0 for each in asking)
    assert len(replicas(head)) == 2


def answered(head: Head) -> str | None:
    """The version that answers; None while nothing does."""
    try:
        return head.version()
    except OSError:
        return None
