"""The site of docs/: which pages its navigation has, where links lead, and that it loads nothing from elsewhere.
`make site` builds it, and every warning of mkdocs ends that."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.links import PROJECT_PAGES, anchor_of, linked, loaded_from_elsewhere, origin_of, place_of, relinked

ROOT = Path(__file__).parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def places(navigation: Any) -> Iterator[str]:
    """The pages of a navigation, in its order."""
    match navigation:
        case str():
            yield navigation
        case list():
            for each in navigation:
                yield from places(each)
        case dict():
            for each in navigation.values():
                yield from places(each)


def missing(navigation: Any, pages: list[str]) -> set[str]:
    """The pages that the navigation has not, has twice, or has though there are none such."""
    listed = list(places(navigation))
    return {page for page in {*listed, *pages} if listed.count(page) != 1 or page not in pages}


def test_every_page_is_in_the_navigation_once():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert missing(SITE["nav"], [*pages, *(place for place in PROJECT_PAGES.values() if place != "index.md")]) == set()


def test_a_page_outside_the_navigation_is_seen():
    assert missing([{"A": "a.md"}, {"B": [{"C": "c.md"}]}], ["a.md", "c.md"]) == set()
    assert missing([{"A": "a.md"}], ["a.md", "b.md"]) == {"b.md"}
    assert missing([{"A": "a.md"}, {"B": "b.md"}], ["a.md"]) == {"b.md"}
    assert missing([{"A": "a.md"}, {"B": "a.md"}], ["a.md"]) == {"a.md"}


def test_what_lies_beside_the_pages_has_a_page_of_its_own():
    assert place_of("docs/data.md") == "data.md"
    assert place_of("CONTRIBUTING.md") == "project/contributing.md"
    assert place_of("learners/ppo.py") == "source/learners/ppo.py.md"
    assert {origin_of(place_of(path)) for path in ("docs/data.md", "bench/README.md")} == {
        "docs/data.md",
        "bench/README.md",
    }
    assert all((ROOT / path).is_file() for path in PROJECT_PAGES)


@pytest.mark.parametrize(
    ("place", "link", "there"),
    [
        ("plan.md", "[a](run-directory.md#x)", "[a](run-directory.md#x)"),
        ("plan.md", "[`a`](../learners/ppo.py#L12)", "[`a`](source/learners/ppo.py.md#L-12)"),
        ("plan.md", "[a](../CONTRIBUTING.md#tests)", "[a](project/contributing.md#tests)"),
        ("plan.md", "[a](../README.md)", "[a](index.md)"),
        ("plan.md", "![a](images/report.png)", "![a](images/report.png)"),
        ("project/benchmarks.md", "[a](../docs/plan.md)", "[a](../plan.md)"),
        ("project/benchmarks.md", "[a](ppo.py)", "[a](../source/bench/ppo.py.md)"),
        ("plan.md", "[a](https://docs.ray.io/x) [b](#below)", "[a](https://docs.ray.io/x) [b](#below)"),
        ("plan.md", "```\n[a](../x.py)\n```", "```\n[a](../x.py)\n```"),
    ],
)
def test_a_link_leads_to_the_page_of_the_site(place, link, there):
    assert relinked(link, place) == there


def test_links_are_found_from_the_root():
    assert linked("[a](../learners/ppo.py#L1) [b](data.md)", "docs/plan.md") == ["learners/ppo.py", "docs/data.md"]


def test_headings_have_the_anchors_of_code_hosts():
    assert anchor_of("`ppo.policy`, `ppo.value`") == "ppopolicy-ppovalue"
    assert anchor_of("metrics.jsonl") == "metricsjsonl"
    assert anchor_of("Choices, and why") == "choices-and-why"
    assert anchor_of("select_sft") == "select_sft"


def test_what_a_browser_would_fetch_elsewhere_is_seen():
    own = '<script src="assets/a.js"></script><link rel="stylesheet" href="a.css"><a href="https://docs.ray.io">Ray</a>'
    assert loaded_from_elsewhere(own) == []
    for tag in (
        '<script src="https://cdn.example/a.js"></script>',
        "<script async src='//cdn.example/a.js'></script>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="//fonts.example" rel="preconnect">',
        '<img alt="a" src="http://images.example/a.png">',
    ):
        assert loaded_from_elsewhere(tag), tag


def test_the_site_asks_for_no_font_or_host_and_is_strict():
    assert SITE["theme"]["font"] is False
    assert SITE["strict"] is True
    assert set(SITE["validation"]["links"].values()) == set(SITE["validation"]["nav"].values()) == {"warn"}
    assert not [key for key in ("extra_javascript", "repo_url") if key in SITE]
    # Under --quiet mkdocs does not count warnings, and its strict mode lets them pass.
    assert re.search(r"mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_what_builds_the_site_is_pinned():
    lines = [line for line in (ROOT / "requirements" / "docs.lock").read_text().splitlines() if line[:1] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9_.-]+==[0-9][\w.]*", line)] == []
    assert {"mkdocs", "mkdocs-material"} <= {line.partition("==")[0] for line in lines}
