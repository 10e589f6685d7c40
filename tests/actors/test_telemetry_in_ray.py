"""A Ray session, an actor that exports all that is declared, and what Prometheus would read from the node."""

import time
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.exported_metrics import LEARNER_KL, RUN_STAGE, SCORING_NON_FINITE, Kind, declared
from actors.telemetry import Telemetry
from cluster.dashboard import queries

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(280)]

WAIT_S = 60.0
FORGOTTEN_S = 35.0
"""Seconds after which Ray has forgotten a gauge that is not set again: ten to its export, twenty in the agent."""


def exporting_class(ray: Any) -> Any:
    """Defined in here, so that Ray takes it along by value."""

    class Exporting:
        """Exports every declared metric, once."""

        def export(self) -> None:
            telemetry = Telemetry("démo", "tester", "one")
            for metric in declared().values():
                tags = dict.fromkeys(metric.tags, "x")
                match metric.kind:
                    case Kind.COUNTER:
                        telemetry.add(metric, 3.0, **tags)
                    case Kind.GAUGE:
                        telemetry.set(metric, 2.5, **tags)
                    case Kind.HISTOGRAM:
                        telemetry.observe(metric, 0.3, **tags)

        def clear(self) -> None:
            Telemetry("démo", "tester", "one").clear(LEARNER_KL, stage="x")

        def count(self) -> None:
            Telemetry("late", "tester", "two").add(SCORING_NON_FINITE)

    return ray.remote(num_cpus=0)(Exporting)


@pytest.fixture(scope="module")
def scrape(ray_session) -> Any:
    """What the node exports of ours: {(series, role): labels and value}."""
    [node] = ray_session.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def read() -> dict[tuple[str, str], tuple[dict[str, str], float]]:
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, sample.labels["run"]): (sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "amenable" in sample.name
        }

    return read


def until(condition: Any, what: str, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s {what} was still awaited from the node's agent"
        time.sleep(1.0)


def test_a_node_exports_exactly_the_declared_names_as_long_as_they_last(ray_session, scrape):
    actor = exporting_class(ray_session)
    exporting = actor.remote()
    ray_session.get(exporting.export.remote(), timeout=WAIT_S)
    Telemetry("demo", "driver").set(RUN_STAGE, 1.0, stage="ppo")
    expected = {series for metric in declared().values() for series in metric.series}
    until(lambda: {name for name, _ in scrape()} >= expected, "every declared metric")
    found = scrape()
    exported_at = time.monotonic()
    assert {name for name, _ in found} == expected
    read_by_queries = {name for query in queries() for name in expected if name in query}
    assert len(read_by_queries) > 40
    labels, value = found["ray_amenable_learner_kl_nats", "d\\xe9mo"]
    assert value == 2.5
    assert {name: labels[name] for name in LEARNER_KL.labels} == {
        "run": "d\\xe9mo",
        "role": "tester",
        "worker": "one",
        "stage": "x",
    }
    assert found["ray_amenable_scoring_non_finite_rewards_total", "d\\xe9mo"][1] == 3.0
    assert found["ray_amenable_publication_seconds_count", "d\\xe9mo"][1] == 1.0
    assert found["ray_amenable_run_stage", "demo"][0]["role"] == "driver"

    # What a process counts just before it is killed arrives.
    killed = actor.remote()
    ray_session.get(killed.count.remote(), timeout=WAIT_S)
    ray_session.kill(killed)
    until(lambda: ("ray_amenable_scoring_non_finite_rewards_total", "late") in scrape(), "the count of a killed actor")

    # A gauge that lasts is there although nobody has set it again; one that does not is gone, as Ray has it.
    time.sleep(max(0.0, FORGOTTEN_S - (time.monotonic() - exported_at)))
    later = {name for name, run in scrape() if run == "d\\xe9mo"}
    gone = {series for metric in declared().values() if not metric.lasts for series in metric.series}
    assert later == expected - gone
    assert gone

    ray_session.get(exporting.clear.remote(), timeout=WAIT_S)
    until(lambda: ("ray_amenable_learner_kl_nats", "d\\xe9mo") not in scrape(), "the end of a gauge that was cleared")
