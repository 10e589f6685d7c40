"""The Grafana dashboard: its queries read what is exported, all that is exported is shown, and Grafana can place it."""

import json
from importlib import resources
from typing import Any

import promql
import pytest

from actors.exported_metrics import declared
from cluster.dashboard import NOT_SHOWN, ROWS, dashboard, not_shown, queries

PACKAGED = json.loads(resources.files("cluster").joinpath("observability", "dashboard.json").read_text())


def graphs(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def misplaced(board: dict[str, Any]) -> list[str]:
    """Titles of panels that lie off Grafana's grid of 24 columns or over another."""
    taken: dict[tuple[int, int], str] = {}
    wrong = []
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        if place["x"] < 0 or place["x"] + place["w"] > 24 or any(cell in taken for cell in cells):
            wrong.append(panel["title"])
        taken |= dict.fromkeys(cells, panel["title"])
    return wrong


def test_the_packaged_file_is_current():
    assert dashboard() == PACKAGED, "run `python docs/make.py`"


def test_every_query_reads_what_is_exported():
    assert len(queries()) > 40
    assert {query: promql.problems(query) for query in queries() if promql.problems(query)} == {}
    assert [target["expr"] for panel in graphs(PACKAGED) for target in panel["targets"]] == queries()


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("learner_kl_nats", "learner_kl_nat", "nobody exports ray_amenable_learner_kl_nat"),
        ("ray_amenable_learner_kl", "amenable_learner_kl", "nobody exports amenable_learner_kl"),
        ("{run=", "{rum=", "has no label rum"),
        ("by (run)", "by (stages)", "no label stages"),
        ("by (run)", "by (run", "does not parse"),
    ],
)
def test_a_typo_in_a_query_is_seen(right, wrong, problem):
    query = next(query for query in queries() if "learner_kl_nats" in query)
    assert right in query
    assert promql.problems(query) == []
    assert any(problem in told for told in promql.problems(query.replace(right, wrong)))


def test_all_that_is_exported_is_shown_or_it_is_said_why_not():
    assert not_shown() == set(NOT_SHOWN)
    assert set(NOT_SHOWN) < set(declared())


def test_what_no_panel_shows_is_found(monkeypatch):
    left = {title: row for title, row in ROWS.items() if title != "Scoring"}
    monkeypatch.setattr("cluster.dashboard.ROWS", left)
    assert "amenable_scoring_non_finite_rewards_total" in not_shown()


def test_every_role_has_a_row_of_panels_and_each_its_place():
    assert [panel["title"] for panel in PACKAGED["panels"] if panel["type"] == "row"] == list(ROWS)
    assert {"Learning", "Stream", "Generators", "Publication", "Scoring", "Fleet", "Memory", "Serving"} <= set(ROWS)
    assert misplaced(PACKAGED) == []
    moved = json.loads(json.dumps(PACKAGED))
    moved["panels"][2]["gridPos"] = dict(moved["panels"][1]["gridPos"])
    assert misplaced(moved) == [moved["panels"][2]["title"]]


def test_it_has_what_grafana_needs_to_import_it():
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= PACKAGED.keys()
    numbers = [panel["id"] for panel in PACKAGED["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {each["name"]: each for each in PACKAGED["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["definition"] == "label_values(ray_amenable_run_stage, run)"
    assert "ray_amenable_run_stage" in promql.SERIES
    for panel in graphs(PACKAGED):
        assert panel["type"] == "timeseries"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all('run=~"$run"' in target["expr"] and target["legendFormat"] for target in panel["targets"])
