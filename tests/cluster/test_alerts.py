"""The alerts: they read what is exported, fire when they should and not when they should not, and lead to the docs."""

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = Path(str(resources.files("cluster").joinpath("observability", "alerts.yaml")))
RULES = [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool, which Debian's package prometheus has"
)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """A series with a value a minute, in promtool's notation."""
    told = ",".join(f'{label}="{value}"' for label, value in {"run": "demo", **labels}.items())
    return {"series": f"ray_amenable_{name}{{{told}}}", "values": values}


def kl(values: str, target: str | None = None) -> list[dict[str, str]]:
    found = [series("learner_kl_nats", values, stage="ppo", role="learner")]
    return found + ([series("learner_kl_target_nats", target, stage="ppo", role="learner")] if target else [])


def trained(values: str, mean_update_s: int | None = None) -> list[dict[str, str]]:
    found = [series("stream_trained_timestamp_seconds", values)]
    if mean_update_s is not None:
        found += [
            series("learner_update_seconds_sum", f"{mean_update_s}x60", stage="ppo"),
            series("learner_update_seconds_count", "1x60", stage="ppo"),
        ]
    return found


def generators(healthy: str, wanted: str) -> list[dict[str, str]]:
    return [
        series("fleet_workers", healthy, role="generator", state="healthy"),
        series("fleet_workers", "9x60", role="scoring", state="healthy"),
        series("fleet_wanted_workers", wanted, role="generator"),
    ]


def requests(failed: str, answered: str, status: str = "500") -> list[dict[str, str]]:
    return [series("requests_total", failed, status=status), series("requests_total", answered, status="200")]


APPEARS, STAYS = "_x10 1x50", "1x60"
"""A counter that is first seen, at 1, after ten minutes; one that was there before."""

FIRES: dict[str, list[tuple[list[dict[str, str]], int]]] = {
    "AmenableKlBlowUp": [(kl("5 5 5 30x60", "6x60"), 20), (kl("4x60 20x15"), 70)],
    "AmenableLearnerStalled": [
        (trained("60x60"), 45),
        (trained("60x60", mean_update_s=100), 45),
        ([series("learner_step_timestamp_seconds", "60x60", stage="sft")], 45),
    ],
    "AmenableStreamEmpty": [([series("stream_awaited_timestamp_seconds", "60x60")], 20)],
    "AmenableSyncTimeout": [
        ([series("publication_begun_timestamp_seconds", "60x60")], 10),
        ([series("publication_failures_total", APPEARS)], 12),
        ([series("publication_losses_total", APPEARS, reason="late")], 12),
        ([series("publication_losses_total", "2x40 3x20", reason="late")], 45),
    ],
    "AmenableNonFiniteReward": [([series("scoring_non_finite_rewards_total", APPEARS, worker="scoring-0")], 12)],
    "AmenableNonFiniteFigures": [([series("learner_non_finite_figures_total", APPEARS, stage="ppo")], 12)],
    "AmenableGeneratorLost": [(generators("1x60", "2x60"), 15)],
    "AmenableNoGenerator": [(generators("0x60", "2x60"), 15)],
    "AmenableWeightsNotWritten": [([series("weight_store_write_failures_total", APPEARS, place="disk")], 12)],
    "AmenableRequestsFail": [(requests("0+1x60", "0+9x60"), 30)],
}
QUIET: dict[str, list[tuple[list[dict[str, str]], int]]] = {
    "AmenableKlBlowUp": [
        (kl("10x60", "6x60"), 20),
        (kl("5 5 5 30x1 5x60", "6x60"), 20),
        (kl("4x60 11x15"), 70),
        (kl("0.5x60 3x15"), 70),
    ],
    "AmenableLearnerStalled": [
        (trained("60+60x60"), 45),
        (trained("60x60", mean_update_s=900), 45),
        (trained("60x30 stale"), 59),  # the stage is over
        ([series("learner_step_timestamp_seconds", "60+60x60", stage="sft")], 45),
    ],
    "AmenableStreamEmpty": [
        ([series("stream_awaited_timestamp_seconds", "0x60")], 20),
        ([series("stream_awaited_timestamp_seconds", "60+60x60")], 20),
    ],
    "AmenableSyncTimeout": [
        ([series("publication_begun_timestamp_seconds", "0x60")], 10),
        ([series("publication_failures_total", APPEARS)], 40),
        ([series("publication_losses_total", STAYS, reason="late")], 40),
        ([series("publication_losses_total", APPEARS, reason="dead")], 12),
    ],
    "AmenableNonFiniteReward": [
        ([series("scoring_non_finite_rewards_total", APPEARS)], 40),
        ([series("scoring_non_finite_rewards_total", STAYS)], 40),
    ],
    "AmenableNonFiniteFigures": [([series("learner_non_finite_figures_total", STAYS, stage="ppo")], 40)],
    "AmenableGeneratorLost": [(generators("2x60", "2x60"), 15), (generators("2x10 1x3 2x60", "2x60"), 15)],
    "AmenableNoGenerator": [(generators("0x5 1x60", "2x60"), 15)],
    "AmenableWeightsNotWritten": [([series("weight_store_write_failures_total", STAYS, place="disk")], 40)],
    "AmenableRequestsFail": [
        (requests("0+1x60", "0+99x60"), 30),
        (requests("0+9x60", "0+9x60", status="429"), 30),
        (requests("0x60", "0x60"), 30),
    ],
}


def promtool(directory: Path, alert: str, cases: list[tuple[list[dict[str, str]], int]], fires: bool) -> Any:
    """Runs the cases through Prometheus' own tool: that `alert` fires at the minute of each, or does not."""
    tests = [
        {
            "interval": "1m",
            "input_series": given,
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing",run="demo"}})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for given, minute in cases
    ]
    told = {"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": tests}
    path = directory / "tests.yaml"
    path.write_text(json.dumps(told))  # which is YAML too
    return subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60)


# what they say -------------------------------------------------------------------------------------------------------


def test_there_is_an_alert_for_all_that_must_be_told():
    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES) == set(FIRES) == set(QUIET)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_reads_what_is_exported_and_says_what_it_is(rule):
    assert promql.problems(rule["expr"]) == []
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["summary"].startswith("{{ $labels.run }}: ")
    assert "unless" in rule["expr"] or re.search(r"[<>]|==", rule["expr"])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_typo_in_any_name_of_an_alert_is_seen(rule):
    for name in promql.names(rule["expr"]):
        assert any(f"{name}s" in told for told in promql.problems(re.sub(rf"\b{name}\b", f"{name}s", rule["expr"])))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_leads_to_its_part_of_the_page(rule):
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^### (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
    assert rule["alert"] in headings


# when they fire ------------------------------------------------------------------------------------------------------


@needs_promtool
def test_prometheus_takes_the_file():
    run = subprocess.run(["promtool", "check", "rules", str(FILE)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert f"{len(RULES)} rules found" in run.stdout


@needs_promtool
@pytest.mark.parametrize("alert", NAMES)
def test_it_fires_when_it_should(alert, tmp_path):
    run = promtool(tmp_path, alert, FIRES[alert], fires=True)
    assert run.returncode == 0, run.stderr + run.stdout
    assert promtool(tmp_path, alert, FIRES[alert], fires=False).returncode != 0


@needs_promtool
@pytest.mark.parametrize("alert", NAMES)
def test_it_is_quiet_when_it_should_be(alert, tmp_path):
    run = promtool(tmp_path, alert, QUIET[alert], fires=False)
    assert run.returncode == 0, run.stderr + run.stdout
