"""A corpus from files, the HH comparisons among them."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from corpus.dialogues import prompts_in
from corpus.files import FileCorpusSettings, load_files
from corpus.problems import UsageProblem
from corpus.splits import is_held_out

HH = Path(__file__).parents[2].parent / "shared" / "data" / "hh-rlhf"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def users(rows):
    return {row.user_id for row in rows}


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(40)]
    return write(tmp_path / "pairs.jsonl", rows)


def test_one_source_of_pairs_gives_every_part(pairs):
    corpus = load_files(FileCorpusSettings(path=pairs))
    assert corpus.comparisons_train is not None
    assert corpus.comparisons_valid is not None
    for train, valid in (
        (corpus.demonstrations_train, corpus.demonstrations_valid),
        (corpus.prompts_ppo, corpus.prompts_heldout),
        (corpus.comparisons_train, corpus.comparisons_valid),
    ):
        assert len(train) + len(valid) == 40
        assert users(train) == users(corpus.prompts_ppo)
        assert not users(train) & users(valid)
    prompt = corpus.demonstrations_train[0].prompt
    assert corpus.pretraining_train[0] == f"\n\nHuman: {prompt}\n\nAssistant: good {prompt.split()[1]}"
    assert len(corpus.pretraining_train) == len(corpus.demonstrations_train)


def test_parts_can_come_from_sources_of_their_own(pairs, tmp_path):
    texts = write(tmp_path / "texts.jsonl", [{"text": f"document {n}"} for n in range(30)])
    asked = write(tmp_path / "prompts.jsonl", [{"prompt": f"asked {n}"} for n in range(30)])
    sources = {"path": pairs, "pretraining": texts, "prompts": {"path": asked}}
    corpus = load_files(FileCorpusSettings.model_validate(sources))
    assert {text.split()[0] for text in corpus.pretraining_train} == {"document"}
    assert {row.prompt.split()[0] for row in corpus.prompts_ppo + corpus.prompts_heldout} == {"asked"}
    assert {row.prompt.split()[0] for row in corpus.demonstrations_train} == {"question"}


def test_a_user_held_out_in_one_file_is_held_out_in_all(tmp_path):
    shown = [{"prompt": f"d{n}", "response": "x", "user_id": f"u{n % 30}"} for n in range(60)]
    ranked = [{"prompt": f"c{n}", "chosen": "x", "rejected": "y", "user_id": f"u{n % 30}"} for n in range(60)]
    corpus = load_files(
        FileCorpusSettings.model_validate(
            {
                "path": write(tmp_path / "a.jsonl", shown),
                "comparisons": write(tmp_path / "b.jsonl", ranked),
                "held_out_fraction": 0.4,
            }
        )
    )
    assert corpus.comparisons_train is not None
    assert users(corpus.comparisons_train) == users(corpus.demonstrations_train) == users(corpus.prompts_ppo)


def test_demonstrations_alone_leave_the_comparisons_to_the_run(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(30)
    ]
    corpus = load_files(FileCorpusSettings(path=write(tmp_path / "chat.jsonl", rows)))
    assert corpus.comparisons_train is None
    assert corpus.comparisons_valid is None


def test_duplicates_and_zealous_users_are_thinned(tmp_path):
    rows = [{"prompt": f"{n:02d}" + "x" * 10 + str(copy), "response": "a"} for n in range(30) for copy in range(3)]
    rows += [{"prompt": f"zealous {n}", "response": "a", "user_id": "z"} for n in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    corpus = load_files(FileCorpusSettings(path=path, duplicate_prefix_characters=12, max_prompts_per_user=5))
    everything = corpus.prompts_ppo + corpus.prompts_heldout
    assert len(everything) + corpus.left_out["prompts"] == 30 + 5
    assert len(load_files(FileCorpusSettings(path=path)).prompts_ppo) > len(corpus.prompts_ppo), "negative control"


ASKED = st.integers(0, 400).map(lambda number: f"{number:03d} and more")
ROWS = st.lists(st.tuples(ASKED, st.integers(0, 40)), min_size=60, max_size=150)


def texts_of(corpus, side):
    """Every prompt of one side of a corpus, those of documents included."""
    rows = [getattr(corpus, name) for name in SIDES[side]]
    prompts = [row.prompt for part in rows[1:] for row in part or []]
    return prompts + [prompt for text in rows[0] for prompt in prompts_in(text)]


SIDES = {
    "train": ("pretraining_train", "demonstrations_train", "prompts_ppo", "comparisons_train"),
    "valid": ("pretraining_valid", "demonstrations_valid", "prompts_heldout", "comparisons_valid"),
}


@given(shown=ROWS, ranked=ROWS, prefix=st.sampled_from([2, 5, 200]), own_source=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_no_training_row_has_a_prompt_that_is_held_out_anywhere(shown, ranked, prefix, own_source, tmp_path):
    pairs = [{"prompt": p, "chosen": "x", "rejected": "y", "user_id": user} for p, user in ranked]
    sources = {"path": write(tmp_path / "ranked.jsonl", pairs), "duplicate_prefix_characters": prefix}
    if own_source:
        answered = [{"prompt": p + " ", "response": "x", "user_id": user} for p, user in shown]
        sources["demonstrations"] = write(tmp_path / "shown.jsonl", answered)
    try:
        corpus = load_files(FileCorpusSettings.model_validate(sources))
    except UsageProblem:
        reject()  # a side is empty, which must stay rare
    held_out = {prompt.strip()[:prefix] for prompt in texts_of(corpus, "valid")}
    assert not [prompt for prompt in texts_of(corpus, "train") if prompt.strip()[:prefix] in held_out]


def test_training_rows_left_out_for_a_held_out_prompt_are_counted(tmp_path):
    draw = random.Random(0)
    rows = [
        {"prompt": f"question {draw.randrange(150)}", "chosen": "x", "rejected": "y", "user_id": draw.randrange(40)}
        for _ in range(600)
    ]
    corpus = load_files(FileCorpusSettings(path=write(tmp_path / "a.jsonl", rows)))
    assert not set(texts_of(corpus, "train")) & set(texts_of(corpus, "valid"))
    assert corpus.comparisons_train is not None
    assert corpus.comparisons_valid is not None
    assert len(corpus.comparisons_train) + len(corpus.comparisons_valid) + corpus.left_out["comparisons"] == 600
    assert corpus.left_out["comparisons"] > 100, "negative control: users do share prompts here"
    assert corpus.left_out["pretraining"] == corpus.left_out["comparisons"]


def test_a_conversation_that_answers_a_held_out_prompt_on_its_way_is_no_training_text(tmp_path):
    user = next(name for name in map(str, range(99)) if is_held_out(name, 0.2, 0))
    chat = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    rows = [{"messages": [*chat, {"role": "assistant", "content": "b"}], "user_id": f"u{n}"} for n in range(30)]
    asked = {"messages": chat[:2], "user_id": user}
    other = [{"messages": [{"role": "user", "content": f"p{n}"}, chat[1]]} for n in range(30)]
    corpus = load_files(FileCorpusSettings(path=write(tmp_path / "a.jsonl", [*rows, asked, *other])))
    assert not [text for text in corpus.pretraining_train if text.startswith("\n\nHuman: q\n")]
    assert corpus.left_out["pretraining"] > 10


def test_a_training_side_that_loses_every_row_is_said(tmp_path):
    rows = [{"prompt": "the same", "chosen": "x", "rejected": "y", "user_id": n} for n in range(30)]
    shown = [{"prompt": f"p{n}", "response": "x"} for n in range(30)]
    sources = {"path": write(tmp_path / "a.jsonl", shown), "comparisons": write(tmp_path / "b.jsonl", rows)}
    with pytest.raises(UsageProblem, match="training split of the comparisons is empty: the prompt of each of its"):
        load_files(FileCorpusSettings.model_validate(sources))


@pytest.mark.parametrize(
    ("given_settings", "rows", "message"),
    [
        ({}, [{"text": f"t{n}"} for n in range(30)], "has no demonstrations"),
        ({}, [{"prompt": "one", "response": "a"}], "split of the documents is empty"),
        ({"comparisons": "SAME"}, [{"prompt": f"p{n}", "response": "a"} for n in range(30)], "no comparisons"),
    ],
)
def test_what_is_missing_is_said(given_settings, rows, message, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    sources = {"path": path} | {key: path if value == "SAME" else value for key, value in given_settings.items()}
    with pytest.raises(UsageProblem, match=message):
        load_files(FileCorpusSettings.model_validate(sources))


def test_a_corpus_without_a_source_is_a_usage_problem():
    with pytest.raises(UsageProblem, match="no source for its pretraining"):
        load_files(FileCorpusSettings())


@pytest.mark.skipif(not HH.exists(), reason="the HH data is not beside this checkout (../shared/data/hh-rlhf)")
def test_the_hh_comparisons_are_a_whole_corpus():
    corpus = load_files(FileCorpusSettings(path=str(HH)))
    assert corpus.comparisons_train is not None
    assert corpus.comparisons_valid is not None
    assert set(corpus.left_out.values()) == {0}, "each opening has one user: nobody's prompt is held out elsewhere"
    total = len(corpus.comparisons_train) + len(corpus.comparisons_valid)
    assert total == 1800
    assert 0.17 < len(corpus.comparisons_valid) / total < 0.23
    assert not users(corpus.comparisons_train) & users(corpus.comparisons_valid)
    assert not users(corpus.demonstrations_train) & users(corpus.prompts_heldout)
    assert {len(row.responses) for row in corpus.comparisons_train} == {2}
    assert all(text.startswith("\n\nHuman: ") for text in corpus.pretraining_train)
    held_out = {row.prompt for row in corpus.prompts_heldout}
    assert not any(row.prompt in held_out for row in corpus.prompts_ppo)
