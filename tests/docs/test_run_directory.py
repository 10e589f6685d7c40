"""docs/run-directory.md names what the program writes, no more and no less."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from actors.episodes import EPISODE
from amenable.summary import Summary
from evaluation.results import SAMPLE_COLUMNS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "run-directory.md").read_text()
KINDS = "published|objective|response|policy|loss|val|valid|staleness|mismatch|sync|time|throughput|memory|stream"
METRIC = re.compile(rf"(?:{KINDS})/[a-z_]+")
ACTORS = ("conductor.py", "stream.py", "weight_store.py")
WRITERS = [*(ROOT / "learners").glob("*.py"), *(ROOT / "actors" / name for name in ACTORS)]


def written_metrics(sources: Iterable[str]) -> set[str]:
    """Strings of a source that are a metric's name; "valid/" + a name that is put together counts as "valid/"."""
    found: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                found.add(node.value)
    return found


def test_every_metric_that_is_written_is_listed_and_none_else():
    section = PAGE.partition("## metrics.jsonl")[2].partition("\n## ")[0]
    listed = {name for name in re.findall("`([^`]+)`", section) if METRIC.fullmatch(name)}
    written = written_metrics(path.read_text() for path in WRITERS)
    # rm puts its names together: "valid/" and what _validate returns.
    put_together = {"valid/accuracy", "valid/pairs"}
    assert len(written) > 30
    assert listed - put_together == written


def test_a_new_metric_would_be_seen():
    assert written_metrics(['figures["objective/surprise"] = 1.0']) == {"objective/surprise"}
    assert "objective/surprise" not in PAGE


def test_the_keys_of_the_summary_are_listed():
    section = PAGE.partition("## summary.json")[2]
    assert [key for key in Summary.model_fields if f"`{key}`" not in section] == []


def test_the_columns_of_episodes_and_answers_are_listed():
    assert ", ".join(EPISODE.names) in " ".join(PAGE.split())
    assert ", ".join(SAMPLE_COLUMNS) in " ".join(PAGE.split())
