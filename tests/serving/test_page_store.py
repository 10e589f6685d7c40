"""Comparisons that are kept: what may be kept, what comes back, and what an id can never reach."""

import json
from pathlib import Path

import pytest

from corpus.problems import RunProblem, UsageProblem
from serving.page import store as page_store
from serving.page.store import MAX_COMPARISON_BYTES, Comparison, ComparisonStore, parse_comparison
from tests.serving.page_stand_in import COMPARISON


def changed(**values: object) -> bytes:
    return json.dumps({**COMPARISON, **values}).encode()


def comparison() -> Comparison:
    return parse_comparison(changed())


def test_what_is_kept_comes_back_and_leads_the_history(tmp_path: Path):
    store = ComparisonStore(tmp_path / "comparisons")
    assert store.newest() == []
    first = store.keep(comparison(), "ann")
    second = store.keep(parse_comparison(changed(prompt="x" * 500)), "bob")
    assert store.read(first.id) == first
    assert first.model_dump(include={"prompt", "sampling", "answers"}) == comparison().model_dump()
    assert {one.id for one in store.newest()} == {first.id, second.id}
    assert {len(one.prompt) for one in store.newest()} == {len(COMPARISON["prompt"]), 121}


def test_an_id_is_random_and_says_nothing_of_the_prompt(tmp_path: Path):
    store = ComparisonStore(tmp_path)
    ids = {store.keep(comparison(), "ann").id for _ in range(20)}
    assert len(ids) == 20
    assert all(len(one) == 24 and set(one) <= set("0123456789abcdef") for one in ids)


@pytest.mark.parametrize(
    "name", ["../secret", "..%2fsecret", "secret", "", "A" * 24, "0" * 23, "0" * 24 + "\n", "/etc/passwd"]
)
def test_no_other_name_is_looked_for(tmp_path: Path, name: str):
    store = ComparisonStore(tmp_path / "comparisons")
    kept = store.keep(comparison(), "ann")
    (tmp_path / "secret.json").write_bytes((tmp_path / "comparisons" / f"{kept.id}.json").read_bytes())
    assert store.read(name) is None
    assert store.read(kept.id) is not None


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"{", "the whole body"),
        (b"[]", "the whole body"),
        (changed(prompt=""), "prompt"),
        (changed(answers=[]), "answers"),
        (changed(answers=COMPARISON["answers"] * 9), "answers"),
        (changed(sampling={**COMPARISON["sampling"], "top_p": 0}), "sampling.top_p"),
        (changed(sampling={**COMPARISON["sampling"], "temperature": 1e400}), "the whole body|sampling.temperature"),
        (changed(who="the director"), "who"),
        (changed(id="0" * 24), "id"),
        (changed(prompt="\ud800"), "the whole body"),
    ],
)
def test_what_is_no_comparison_is_refused_with_the_place(body: bytes, where: str):
    with pytest.raises(UsageProblem, match=rf"not a comparison \(({where}):"):
        parse_comparison(body)


def test_a_comparison_that_is_too_large_is_refused():
    with pytest.raises(UsageProblem, match="1,024 KiB"):
        parse_comparison(b" " * (MAX_COMPARISON_BYTES + 1))


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_store, "MAX_STORED", 2)
    store = ComparisonStore(tmp_path)
    store.keep(comparison(), "ann")
    store.keep(comparison(), "ann")
    with pytest.raises(UsageProblem, match="2 comparisons are kept already"):
        store.keep(comparison(), "ann")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_is_told_and_does_not_hide_the_others(tmp_path: Path):
    store = ComparisonStore(tmp_path)
    good = store.keep(comparison(), "ann")
    bad = store.keep(comparison(), "ann")
    path = tmp_path / f"{bad.id}.json"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunProblem, match=bad.id):
        store.read(bad.id)
    assert [one.id for one in store.newest()] == [good.id]
