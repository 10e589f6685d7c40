"""The formats of rows: which one a row is in, and the prompts, demonstrations and comparisons it holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from corpus.dialogues import (
    check_messages,
    continues,
    dialogue,
    is_dialogue,
    messages_of,
    opening_of,
    prompt_of,
    settled,
    split_pair,
)
from corpus.problems import UsageProblem
from corpus.readers import RawRow, read_rows
from corpus.rows import Comparison, Demonstration, Document, Prompt

Format = Literal["prompt", "prompt_response", "messages", "pairs", "rankings", "text"]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "rankings": ("prompt", "responses", "ranks"),
    "pairs": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt_response": ("prompt", "response"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""The columns a format needs, in the order in which they are looked for."""


@dataclass
class Rows:
    """What a source holds, in its order. Which lists are filled depends on its format:

    prompts: all but text. demonstrations: the response, the conversation's last assistant turn, or the best-ranked
    response; left out where that is empty. comparisons: pairs (K = 2) and rankings. documents: the text, or each
    demonstration as a whole dialogue.
    """

    prompts: list[Prompt] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)


def detect_format(row: RawRow) -> Format:
    """The format that the row's columns say. UsageProblem, naming the columns of each, where they say none."""
    for name, columns in COLUMNS.items():
        if all(row.columns.get(column) is not None for column in columns):
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    raise UsageProblem(
        f"{row.place}: the columns ({', '.join(map(str, row.columns)) or 'none'}) fit none of the formats ({known}).",
        "data/format",
    )


def read_source(address: str, format: Format | Literal["auto"] = "auto") -> Rows:
    """All that the source at `address` holds (see `read_rows` for addresses), in the format given or detected.

    Raises UsageProblem where a row is malformed or of another format than the first, naming its place, or where
    there is no row.
    """
    rows = Rows()
    found: Format | None = None if format == "auto" else format
    for raw in read_rows(address):
        if found is None:
            found = detect_format(raw)
        _add(rows, raw, found)
        if format == "auto" and (other := detect_format(raw)) != found:  # else its columns were dropped in silence
            raise UsageProblem(
                f"{raw.place}: this row has the columns of {other} ({', '.join(COLUMNS[other])}), the rows before it "
                f"are {found}: give each format a source of its own, or set format: {found}.",
                "data/format",
            )
    if not (rows.prompts or rows.documents):
        raise UsageProblem(f"{address}: there are no rows.", "data/empty")
    return rows


def identity(*parts: str) -> str:
    """Sixteen hexadecimal digits that stand for these texts: ids of prompts, and of users that are not named."""
    return blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _add(rows: Rows, raw: RawRow, format: Format) -> None:
    for column in COLUMNS[format]:
        if raw.columns.get(column) is None:
            raise UsageProblem(
                f"{raw.place}: the column {column} is missing or empty; the format is {format}.", "data/row"
            )
    try:
        _ADD[format](rows, raw)
    except UsageProblem as problem:
        raise UsageProblem(f"{raw.place}: {problem}.", problem.code) from problem


def _add_text(rows: Rows, raw: RawRow) -> None:
    text = _text(raw, "text")
    rows.documents.append(Document(_given(raw, "user_id") or identity(text), text))


def _add_prompt(rows: Rows, raw: RawRow) -> None:
    rows.prompts.append(_prompt(raw, _prompt_column(raw)))


def _add_prompt_response(rows: Rows, raw: RawRow) -> None:
    _add_answered(rows, _prompt(raw, _prompt_column(raw)), _text(raw, "response").strip())


def _add_messages(rows: Rows, raw: RawRow) -> None:
    prompt, response = _split_messages(raw.columns["messages"])
    if response is None:
        rows.prompts.append(_prompt(raw, prompt))
    else:
        _add_answered(rows, _prompt(raw, prompt), response)


def _add_pair(rows: Rows, raw: RawRow) -> None:
    _add_comparison(rows, _pair(raw))


def _add_ranking(rows: Rows, raw: RawRow) -> None:
    _add_comparison(rows, _ranking(raw))


_ADD: dict[Format, Callable[[Rows, RawRow], None]] = {
    "rankings": _add_ranking,
    "pairs": _add_pair,
    "messages": _add_messages,
    "prompt_response": _add_prompt_response,
    "text": _add_text,
    "prompt": _add_prompt,
}


def _add_comparison(rows: Rows, row: Comparison) -> None:
    rows.comparisons.append(row)
    prompt = Prompt(row.prompt_id, row.user_id, row.prompt, row.meta)
    best = row.responses[row.ranks.index(0)]
    if best:
        _add_answered(rows, prompt, best)
    else:  # the labeler liked silence best: a comparison, but nothing to imitate
        rows.prompts.append(prompt)


def _add_answered(rows: Rows, prompt: Prompt, response: str) -> None:
    if not response:
        raise UsageProblem("the response is empty", "data/row")
    rows.prompts.append(prompt)
    rows.demonstrations.append(Demonstration(prompt.prompt_id, prompt.user_id, prompt.prompt, response, prompt.meta))
    turns = [*messages_of(prompt.prompt), {"role": "assistant", "content": response}]
    rows.documents.append(Document(prompt.user_id, dialogue(turns, reply_next=False)))


def _prompt(raw: RawRow, text: str) -> Prompt:
    if not text.strip():
        raise UsageProblem("the prompt is empty", "data/row")
    prompt_id = _given(raw, "prompt_id") or identity(text)
    # A row without a user belongs to whoever opened so: a split by user never separates one opening prompt.
    opening = " ".join(opening_of(text).lower().split())
    user_id = _given(raw, "user_id") or identity(opening)
    return Prompt(prompt_id, user_id, text, _meta(raw.columns.get("meta")))


def _given(raw: RawRow, column: str) -> str:
    """The id in `column` as text, "" where there is none. The number 0 is an id like any other."""
    value = raw.columns.get(column)
    return "" if value is None else str(value)


def _meta(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value:  # as this program's own tables hold it
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageProblem(f"meta is text but not JSON ({error.msg})", "data/row") from error
    if not isinstance(value or {}, dict):
        raise UsageProblem("meta should be an object", "data/row")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date or bytes of a Parquet file, say
        raise UsageProblem(f"meta holds what JSON cannot ({error})", "data/row") from error
    return value or {}


def _text(raw: RawRow, column: str) -> str:
    value = raw.columns[column]
    if not isinstance(value, str):
        raise UsageProblem(f"the column {column} should be text, not {type(value).__name__}", "data/row")
    return value


def _prompt_column(raw: RawRow) -> str:
    value = raw.columns["prompt"]
    if isinstance(value, str):
        return prompt_of(messages_of(value)) if is_dialogue(value) else value
    if not isinstance(value, list):
        raise UsageProblem(f"the prompt should be text or a list of messages, not {type(value).__name__}", "data/row")
    return prompt_of(check_messages(value))


def _split_messages(value: Any) -> tuple[str, str | None]:
    """Prompt and last assistant turn; None where the conversation ends with the user."""
    messages = check_messages(value)
    if messages[-1]["role"] != "assistant":
        return prompt_of(messages), None
    if len(messages) == 1:
        raise UsageProblem("the conversation has an assistant turn and no user turn", "data/row")
    return prompt_of(messages[:-1]), messages[-1]["content"].strip()


def _pair(raw: RawRow) -> Comparison:
    chosen, rejected = raw.columns["chosen"], raw.columns["rejected"]
    named = raw.columns.get("prompt") is not None
    for value in (chosen, rejected):
        if not isinstance(value, str | list):
            raise UsageProblem(
                f"chosen and rejected should be texts or lists of messages, not {type(value).__name__}", "data/row"
            )
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, good, bad = _text_pair(_prompt_column(raw) if named else None, chosen, rejected)
    elif named and len(chosen) == len(rejected) == 1:
        good, bad = (check_messages(value)[0]["content"].strip() for value in (chosen, rejected))
        prompt = _prompt_column(raw)
    else:
        prompt, good = _split_messages(chosen)
        other, bad = _split_messages(rejected)
        if prompt != other or good is None or bad is None:
            raise UsageProblem(
                "chosen and rejected should differ in the last assistant turn and in nothing else", "data/row"
            )
    if good == bad:
        raise UsageProblem("chosen and rejected are the same reply", "data/row")
    return _comparison(raw, prompt, (good, bad), (0, 1))


def _text_pair(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and both replies, of replies to a prompt or of whole dialogues (with or without a prompt beside them)."""
    if prompt is None:
        return split_pair(chosen, rejected)
    if not (is_dialogue(chosen) and is_dialogue(rejected)):
        return prompt, chosen.strip(), rejected.strip()
    if not (continues(chosen, prompt) and continues(rejected, prompt)):
        raise UsageProblem("chosen and rejected are whole dialogues that do not begin with the prompt", "data/row")
    shared, good, bad = split_pair(chosen, rejected)
    return (prompt if settled(prompt) == shared else shared), good, bad


def _ranking(raw: RawRow) -> Comparison:
    responses, ranks = raw.columns["responses"], raw.columns["ranks"]
    if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
        raise UsageProblem("responses should be a list of texts", "data/row")
    if len(responses) < 2:
        raise UsageProblem(f"a ranking needs at least 2 responses, not {len(responses)}", "data/row")
    if not isinstance(ranks, list) or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise UsageProblem("ranks should be a list of whole numbers, the best lowest, ties equal", "data/row")
    if len(ranks) != len(responses):
        raise UsageProblem(f"there are {len(responses)} responses and {len(ranks)} ranks", "data/row")
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    responses = tuple(response.strip() for response in responses)
    return _comparison(raw, _prompt_column(raw), responses, tuple(places[rank] for rank in ranks))


def _comparison(raw: RawRow, prompt: str, responses: tuple[str, ...], ranks: tuple[int, ...]) -> Comparison:
    row = _prompt(raw, prompt)
    labeler = _given(raw, "labeler_id")
    return Comparison(row.prompt_id, row.user_id, labeler, row.prompt, responses, ranks, row.meta)
