"""docs/run-directory.md names what the program writes, no more and no less."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from actors.episodes import EPISODE
from actors.role_reports import RoleReport, role_figures
from amenable.summary import Summary
from evaluation.results import SAMPLE_COLUMNS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "run-directory.md").read_text()
KINDS = "published|objective|response|policy|loss|val|valid|staleness|mismatch|sync|time|throughput|memory|stream|eval"
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
    # rm puts its names together: "valid/" and what _validate returns; so do the figures of a role.
    put_together = {"valid/accuracy", "valid/pairs", "memory/generators_bytes", "memory/scoring_bytes"}
    assert len(written) > 30
    assert listed - put_together == written


TRL = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio
val/ratio_var val/num_eos_tokens lr episode"""


def test_figures_have_the_names_that_users_of_trl_know():
    listed = set(re.findall("`([^`]+)`", PAGE.partition("## metrics.jsonl")[2].partition("\n## ")[0]))
    assert [name for name in TRL.split() if name not in listed] == []


def test_the_figures_of_each_role_are_listed():
    began, now = RoleReport(0.0, 0.0, 0, 0.0, 0), RoleReport(1.0, 1.0, 1, 1.0, 1)
    for role in ("generators", "scoring"):
        names = role_figures(role, {"one": began}, {"one": now})
        assert len(names) == 4
        assert [name for name in names if f"`{name}`" not in PAGE] == []
    assert [name for name in role_figures("players", {}, {"one": now}) if f"`{name}`" not in PAGE]


def test_a_new_metric_would_be_seen():
    assert written_metrics(['figures["objective/surprise"] = 1.0']) == {"objective/surprise"}
    assert "objective/surprise" not in PAGE


def test_the_keys_of_the_summary_are_listed():
    section = PAGE.partition("## summary.json")[2]
    assert [key for key in Summary.model_fields if f"`{key}`" not in section] == []


def test_the_columns_of_episodes_and_answers_are_listed():
    assert ", ".join(EPISODE.names) in " ".join(PAGE.split())
    assert ", ".join(SAMPLE_COLUMNS) in " ".join(PAGE.split())
