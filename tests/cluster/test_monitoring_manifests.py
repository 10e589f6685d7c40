"""Alerts and dashboard among the manifests."""

import copy
import json

import pytest
import yaml
from asked_manifests import documents
from typer.testing import CliRunner

from amenable.cli import app
from cluster.dashboard import dashboard
from cluster.manifest_rules import problems
from cluster.manifests import monitoring


def test_they_are_written_where_they_are_asked_for_and_are_of_no_run():
    without, with_them = documents(), documents(monitoring=True)
    assert with_them[: len(without)] == without
    added = with_them[len(without) :]
    assert added == documents(run="another", monitoring=True)[-len(added) :]
    assert [each["kind"] for each in added] == ["PrometheusRule", "ConfigMap"]
    assert problems(with_them) == []


def test_the_command_writes_them():
    ended = CliRunner().invoke(app, ["manifests", "demo", "--monitoring"])
    assert ended.exit_code == 0, ended.output
    found = list(yaml.safe_load_all(ended.stdout))
    [rule] = [each for each in found if each["kind"] == "PrometheusRule"]
    assert "AmenableKlBlowUp" in [alert["alert"] for group in rule["spec"]["groups"] for alert in group["rules"]]
    plain = list(yaml.safe_load_all(CliRunner().invoke(app, ["manifests", "demo"]).stdout))
    assert "PrometheusRule" not in [each["kind"] for each in plain]


def test_grafanas_sidecar_finds_the_dashboard():
    [board] = [each for each in monitoring() if each["kind"] == "ConfigMap"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["amenable.json"]) == dashboard()


@pytest.mark.parametrize("place", ["spec", "group", "rule"])
def test_a_typo_in_a_rule_is_seen(place):
    found = copy.deepcopy(monitoring())
    spec = found[0]["spec"]
    assert problems(found) == []
    target = {"spec": spec, "group": spec["groups"][0], "rule": spec["groups"][0]["rules"][0]}[place]
    target["exprs"] = "up"
    [told] = problems(found)
    assert "PrometheusRule amenable-alerts" in told


def test_kubernetes_takes_the_dashboard():
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    [board] = [each for each in monitoring() if each["kind"] == "ConfigMap"]
    kubernetes.validate(board, "1.33", strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate({**board, "datum": {}}, "1.33", strict=True)
