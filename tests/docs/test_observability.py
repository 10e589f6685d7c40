"""docs/observability.md lists what is exported, no more and no less."""

import re

from actors.exported_metrics import TAGS, declared


def test_page_and_dashboard_are_current(make):
    found = make.pages()
    assert found[make.OBSERVABILITY] == make.OBSERVABILITY.read_text(), "run `python docs/make.py`"
    assert found[make.DASHBOARD] == make.DASHBOARD.read_text(), "run `python docs/make.py`"


def test_every_metric_is_listed_with_its_kind_and_tags_and_none_else(make):
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", make.OBSERVABILITY.read_text(), re.MULTILINE)
    listed = {name: (kind, tuple(re.findall("`([^`]+)`", tags))) for name, kind, tags in rows}
    assert listed == {f"ray_{name}": (str(each.kind), each.tags) for name, each in declared().items()}


def test_a_metric_more_makes_the_page_stale(make, monkeypatch):
    from actors import exported_metrics

    table = make.metric_table()
    one = next(iter(declared().values()))
    monkeypatch.setattr(exported_metrics, "_DECLARED", {**declared(), "amenable_more": one})
    assert make.metric_table() != table


def test_the_labels_of_all_metrics_are_explained(make):
    text = make.OBSERVABILITY.read_text()
    assert [tag for tag in TAGS if f"| `{tag}` |" not in text] == []
