"""The declarations: Prometheus' conventions, and figures that there are."""

import re
from pathlib import Path

import pytest

from actors.exported_metrics import TAGS, Kind, Metric, declare, declared, metrics_of, run_tag

PAGE = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
OF_RAY = {"WorkerId", "NodeAddress", "SessionName", "Component", "Version", "JobId"}
OF_PROMETHEUS = {"job", "instance", "le", "quantile"}


def unconventional(name: str) -> bool:
    """Whether a name ends in a unit that is none of Prometheus' base units."""
    unit = name.removesuffix("_total").rpartition("_")[2]
    return unit in {"ms", "milliseconds", "minutes", "hours", "kb", "mb", "gib", "mib", "percent"}


def test_names_are_in_base_units():
    assert len(declared()) > 40
    assert [name for name in declared() if unconventional(name)] == []
    assert unconventional("amenable_pause_ms")
    assert unconventional("amenable_waited_minutes_total")


def test_labels_are_ours_alone_and_each_once():
    for metric in declared().values():
        assert len(set(metric.labels)) == len(metric.labels)
        assert metric.labels[: len(TAGS)] == TAGS
        assert not set(metric.labels) & (OF_RAY | OF_PROMETHEUS)


def test_figures_are_lines_of_the_metrics_file_with_the_tags_of_their_metric():
    listed = set(re.findall("`([^`]+)`", PAGE.partition("## metrics.jsonl")[2].partition("\n## ")[0]))
    taken = [figure for metric in declared().values() for figure in metric.figures]
    assert len(taken) > 20
    assert set(taken) <= listed
    assert len(set(taken)) == len(taken)
    for metric in declared().values():
        for tags in metric.figures.values():
            assert {"stage", *tags} == set(metric.tags)


def test_a_line_gives_the_metrics_of_its_figures_alone():
    found = [(metric.name, dict(tags), value) for metric, tags, value in metrics_of({"objective/kl": 3.0, "none": 1.0})]
    assert found == [("amenable_learner_kl_nats", {}, 3.0)]


@pytest.mark.parametrize(
    ("wrong", "because"),
    [
        (Metric("kl", Kind.GAUGE, "x"), "should be amenable_"),
        (Metric("amenable_Kl", Kind.GAUGE, "x"), "should be amenable_"),
        (Metric("amenable_losses", Kind.COUNTER, "x"), "counters, and they alone"),
        (Metric("amenable_losses_total", Kind.GAUGE, "x"), "counters, and they alone"),
        (Metric("amenable_seconds", Kind.HISTOGRAM, "x"), "histograms, and they alone"),
        (Metric("amenable_seconds", Kind.GAUGE, "x", buckets=(1.0,)), "histograms, and they alone"),
        (Metric("amenable_beta", Kind.GAUGE, "β"), "ASCII"),
        (Metric("amenable_taken", Kind.GAUGE, "x"), "declared twice"),
    ],
)
def test_what_breaks_a_convention_cannot_be_declared(wrong, because):
    taken = {"amenable_taken": Metric("amenable_taken", Kind.GAUGE, "x")}
    with pytest.raises(ValueError, match=because):
        declare(wrong, among=taken)
    right = declare(Metric("amenable_right_total", Kind.COUNTER, "x"), among=taken)
    assert taken["amenable_right_total"] is right
    assert "amenable_right_total" not in declared()


def test_a_histogram_is_read_under_three_names():
    assert Metric("amenable_s", Kind.HISTOGRAM, "x", buckets=(1.0,)).series == (
        "ray_amenable_s_bucket",
        "ray_amenable_s_sum",
        "ray_amenable_s_count",
    )
    assert Metric("amenable_s_total", Kind.COUNTER, "x").series == ("ray_amenable_s_total",)


@pytest.mark.parametrize(
    ("place", "tag"),
    [
        ("runs/demo", "demo"),
        ("/shared/runs/ann/demo-0123456789/", "demo-0123456789"),
        ("s3://bucket/runs/demo?endpoint_override=localhost:9000/x", "demo"),
        ("what?", "what?"),
    ],
)
def test_a_run_is_called_by_the_last_part_of_where_it_is_kept(place, tag):
    assert run_tag(place) == tag
