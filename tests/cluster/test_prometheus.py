"""A Prometheus server reads all that is exported, evaluates the alerts, and answers the queries of the dashboard."""

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.exported_metrics import Kind, Metric, declared
from cluster.dashboard import queries

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="there is no Prometheus server, which Debian's package prometheus has"
)

ALERTS = Path(str(resources.files("cluster").joinpath("observability", "alerts.yaml")))
RULES = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
WAIT_S = 60.0
"""Seconds for whatever is awaited of the server. House default: it is there within three."""

GRAFANA = {"$run": ".+", "$__rate_interval": "10s"}

TAGS = {"stage": "ppo", "state": "healthy", "reason": "late", "status": "500"}
"""Tags that alerts ask for; all others have the value x."""
LONG_AGO_S = 7200.0
TROUBLED = {
    "amenable_learner_kl_nats": 30.0,
    "amenable_learner_kl_target_nats": 6.0,
    "amenable_fleet_workers": 0.0,
    "amenable_fleet_wanted_workers": 2.0,
}
"""What is told of a run for which every alert is right; of all other gauges 1, of Unix times one that is long past."""
CALM = {
    "amenable_learner_kl_nats": 5.0,
    "amenable_learner_kl_target_nats": 6.0,
    "amenable_fleet_workers": 2.0,
    "amenable_fleet_wanted_workers": 2.0,
    "amenable_stream_awaited_timestamp_seconds": 0.0,
    "amenable_publication_begun_timestamp_seconds": 0.0,
}
"""Of a run for which none is; it has counted no failure, and its Unix times are of now."""
FAILURES = ("failures_total", "losses_total", "non_finite_rewards_total", "non_finite_figures_total")

CONTROL = """
groups:
  - name: control
    rules:
      - alert: MatchesTwo
        expr: ray_amenable_run_stage * on (stage) ray_amenable_run_stage
      - alert: CannotBeTold
        expr: ray_amenable_run_stage{run="calm", role="scoring"} > 0
        annotations:
          description: "{{ $labels.run | humanizeDuration }}"
"""
"""Rules that Prometheus loads, one of which it cannot evaluate and one of which it cannot put into words."""


def samples(metric: Metric, run: str, role: str, scrapes: int) -> Iterator[str]:
    """Lines of a node's page, as Ray's agent writes them. Counters grow by 3 a scrape, histograms by three values."""
    is_calm = run == "calm"
    if is_calm and metric.name.endswith(FAILURES):
        return
    tags = {tag: TAGS.get(tag, "x") for tag in metric.tags}
    if is_calm and "status" in tags:
        tags["status"] = "200"
    labels = {"run": run, "role": role, "worker": f"{role}-0", **tags, "WorkerId": "a1", "NodeAddress": "10.0.0.1"}

    def line(series: str, value: float, **more: str) -> str:
        told = ",".join(f'{label}="{text}"' for label, text in {**labels, **more}.items())
        return f"{series}{{{told}}} {value}"

    grown = 3.0 * scrapes
    match metric.kind:
        case Kind.COUNTER:
            yield line(metric.series[0], grown)
        case Kind.HISTOGRAM:
            bucket, total, count = metric.series
            for bound in (*map(str, metric.buckets), "+Inf"):
                yield line(bucket, grown, le=bound)
            yield line(total, 0.01 * grown)
            yield line(count, grown)
        case Kind.GAUGE:
            past = time.time() - (0.0 if is_calm else LONG_AGO_S)
            usual = past if metric.name.endswith("_timestamp_seconds") else 1.0
            yield line(metric.series[0], (CALM if is_calm else TROUBLED).get(metric.name, usual))


def page(scrapes: int) -> str:
    lines = []
    for metric in declared().values():
        lines.append(f"# TYPE ray_{metric.name} {metric.kind}")
        for run in ("troubled", "calm"):
            for role in ("generator", "scoring"):
                lines += samples(metric, run, role, scrapes)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def exporter() -> Iterator[str]:
    """HOST:PORT of a page of everything that is declared, of two runs, on which counters grow."""
    scrapes = 0

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal scrapes
            scrapes += 1
            content = page(scrapes).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class Prometheus:
    """A server under way."""

    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, path: str, **query: str) -> dict[str, Any]:
        """What its API answers: `status`, and `data` or `error`."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.address}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            return json.load(refusal)

    def rules(self) -> dict[str, dict[str, Any]]:
        """Every rule by its name."""
        return {rule["name"]: rule for group in self.ask("/api/v1/rules")["data"]["groups"] for rule in group["rules"]}

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Fails, with the server's log, where `condition` is not so within WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            told = self.log.read_text()
            assert self.process.poll() is None, f"Prometheus has ended: {told}"
            assert time.monotonic() < deadline, f"Waited {WAIT_S:g} s for {what} of Prometheus: {told}"
            time.sleep(0.2)


def started(directory: Path, targets: list[str], rules: list[Path]) -> Prometheus:
    """A server that scrapes and evaluates every second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
    }
    config, log = directory / "prometheus.yml", directory / "prometheus.log"
    config.write_text(yaml.safe_dump(told))
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=directory)
    return Prometheus(f"http://127.0.0.1:{port}", log, process)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, exporter: str) -> Iterator[Prometheus]:
    """A server that has read the page five times, and evaluated the alerts and the controls."""
    directory = tmp_path_factory.mktemp("prometheus")
    control = directory / "control.yaml"
    control.write_text(CONTROL)
    server = started(directory, [exporter], [ALERTS, control])

    def is_ready() -> bool:
        try:
            read = server.ask("/api/v1/query", query="min(count_over_time(ray_amenable_requests_total[1m]))")
        except urllib.error.URLError:
            return False
        except ValueError:  # "Service Unavailable", while it starts
            return False
        return bool(read["data"]["result"]) and int(read["data"]["result"][0]["value"][1]) >= 5

    try:
        server.until(is_ready, "the fifth scrape")
        server.until(
            lambda: all(rule["health"] != "unknown" for rule in server.rules().values()), "the evaluation of all rules"
        )
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=WAIT_S)


def test_every_alert_is_evaluated_without_an_error(prometheus):
    rules = prometheus.rules()
    assert rules.keys() == {*RULES, "MatchesTwo", "CannotBeTold"}
    assert {name for name, rule in rules.items() if rule["health"] != "ok"} == {"MatchesTwo"}, "the control alone"
    assert "duplicate series" in rules["MatchesTwo"]["lastError"]


def test_every_alert_is_of_the_run_in_trouble_alone_and_fires_or_waits_as_it_says(prometheus):
    prometheus.until(
        lambda: all(rule["alerts"] for name, rule in prometheus.rules().items() if name in RULES), "every alert"
    )
    found = {name: prometheus.rules()[name]["alerts"] for name in RULES}
    assert {name: [alert["labels"]["run"] for alert in alerts] for name, alerts in found.items()} == {
        name: ["troubled"] for name in RULES
    }
    states = {name: alerts[0]["state"] for name, alerts in found.items()}
    at_once = {name for name, rule in RULES.items() if rule["for"] == "0m"}
    later = {name for name, rule in RULES.items() if rule["for"] in ("5m", "10m")}
    assert {states[name] for name in at_once} == {"firing"}
    assert {states[name] for name in later} == {"pending"}


def test_what_an_alert_says_can_be_put_into_words(prometheus):
    rules = prometheus.rules()
    for name in RULES:
        (alert,) = rules[name]["alerts"]
        assert alert["annotations"]["summary"].startswith("troubled: ")
        said = "\n".join(alert["annotations"].values())
        assert not any(sign in said for sign in ("{{", "<error", "<no value>", "NaN"))
    (control,) = rules["CannotBeTold"]["alerts"]
    assert control["annotations"]["description"].startswith("<error expanding template")


def test_every_query_of_the_dashboard_is_answered_with_figures(prometheus):
    def answer(query: str) -> dict[str, Any]:
        for variable, value in GRAFANA.items():
            query = query.replace(variable, value)
        return prometheus.ask("/api/v1/query", query=query)

    answers = {query: answer(query) for query in queries()}
    assert {query: told for query, told in answers.items() if told["status"] != "success" or "warnings" in told} == {}
    assert [query for query, told in answers.items() if not told["data"]["result"]] == []
    values = {query: [each["value"][1] for each in told["data"]["result"]] for query, told in answers.items()}
    assert [query for query, found in values.items() if "NaN" in found] == []

    some = next(query for query in queries() if "learner_kl_nats" in query)
    assert answer(some.replace("learner_kl_nats", "learner_kl_nat"))["data"]["result"] == []
    assert answer(some.replace("max by", "maximum by"))["status"] == "error"
