"""Rows of text to token tables, with their length limits; and a tokenizer for runs that start from no base model."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from corpus.problems import UsageProblem
from corpus.rows import Comparison, DemonstrationLike, PromptLike
from corpus.schemas import TableName, make_table, schema
from corpus.templates import (
    adds_bos,
    check_special_tokens,
    choose_template,
    encode_prompts,
    encode_responses,
    encode_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

COUNT_KEY = "count."
"""Prefix of the metadata keys under which a table says how many rows its filters dropped, cut or split."""


class TokenLimits(BaseModel):
    """How long prompts and responses may be, in tokens, and what becomes of longer ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_prompt_tokens: int = Field(
        default=1024, ge=1, description="Longest prompt. InstructGPT: prompts over 1k tokens are filtered out."
    )
    max_response_tokens: int = Field(
        default=1024, ge=1, description="Longest response, EOS included. InstructGPT: responses of at most 1k tokens."
    )
    context_tokens: int = Field(default=2048, ge=2, description="Longest sequence of the model. InstructGPT: 2k.")
    long_prompts: Literal["filter", "refuse"] = Field(
        default="filter",
        description="A longer prompt is left out and counted (InstructGPT), or an error.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "TokenLimits":
        if self.max_prompt_tokens + self.max_response_tokens > self.context_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) + max_response_tokens ({self.max_response_tokens}) "
                f"is more than context_tokens ({self.context_tokens}); raise that, or lower one of the two"
            )
        return self


def counts(table: pa.Table) -> dict[str, int]:
    """How many rows the filters dropped, cut or split, by name: `{"long_prompts": 3, …}`. It survives Parquet."""
    metadata = table.schema.metadata or {}
    pairs = ((key.decode(), value.decode()) for key, value in metadata.items())
    return {key.removeprefix(COUNT_KEY): int(value) for key, value in pairs if key.startswith(COUNT_KEY)}


def tokenise_pretraining(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits) -> pa.Table:
    """The pretraining table: BOS first where the tokenizer adds one, EOS last.

    A document longer than the context is split into windows of that size, one row each; only its last window ends in
    EOS. Counts: split_documents, empty_documents (left out).
    """
    check_special_tokens(tokenizer)
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    rows: list[list[int]] = []
    split = empty = 0
    for document in encode_text(tokenizer, texts):
        if not document:
            empty += 1
            continue
        tokens = [*start, *document, tokenizer.eos_token_id]
        windows = [tokens[at : at + limits.context_tokens] for at in range(0, len(tokens), limits.context_tokens)]
        split += len(windows) > 1
        rows.extend(windows)  # pyright: ignore[reportArgumentType]
    return _counted("pretraining", {"tokens": rows}, {"split_documents": split, "empty_documents": empty})


def tokenise_prompts(rows: Sequence[PromptLike], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits) -> pa.Table:
    """The prompts table. Counts: long_prompts (left out)."""
    check_special_tokens(tokenizer)
    kept = list(_within(rows, encode_prompts(tokenizer, [row.prompt for row in rows]), limits))
    columns = {
        **_columns(kept, ["prompt_id", "user_id", "prompt", "meta"]),
        "prompt_tokens": [tokens for _, tokens in kept],
    }
    return _counted("prompts", columns, {"long_prompts": len(rows) - len(kept)})


def tokenise_demonstrations(
    rows: Sequence[DemonstrationLike], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits
) -> pa.Table:
    """The demonstrations table. Counts: long_prompts and long_responses (both left out).

    A demonstration that is too long is left out, not cut: a cut one would lack the EOS that teaches where to stop.
    """
    check_special_tokens(tokenizer)
    fitting = list(_within(rows, encode_prompts(tokenizer, [row.prompt for row in rows]), limits))
    responses = encode_responses(tokenizer, [row.response for row, _ in fitting])
    both = [
        (row, prompt, response)
        for (row, prompt), response in zip(fitting, responses, strict=True)
        if len(response) <= limits.max_response_tokens
    ]
    kept = [(row, prompt) for row, prompt, _ in both]
    columns = {
        **_columns(kept, ["prompt_id", "user_id", "prompt", "response", "meta"]),
        "prompt_tokens": [prompt for _, prompt, _ in both],
        "response_tokens": [response for _, _, response in both],
    }
    dropped = {"long_prompts": len(rows) - len(fitting), "long_responses": len(fitting) - len(both)}
    return _counted("demonstrations", columns, dropped)


def tokenise_comparisons(
    rows: Sequence[Comparison], tokenizer: "PreTrainedTokenizerBase", limits: TokenLimits
) -> pa.Table:
    """The comparisons table. Counts: long_prompts (left out) and cut_responses.

    A response that is too long is cut without EOS, as a policy's sample at its token limit is.
    """
    check_special_tokens(tokenizer)
    kept = list(_within(rows, encode_prompts(tokenizer, [row.prompt for row in rows]), limits))
    encoded = encode_responses(tokenizer, [response for row, _ in kept for response in row.responses])
    cut = sum(len(tokens) > limits.max_response_tokens for tokens in encoded)
    following = iter(tokens[: limits.max_response_tokens] for tokens in encoded)
    columns = {
        **_columns(kept, ["prompt_id", "user_id", "labeler_id", "prompt", "meta"]),
        "prompt_tokens": [tokens for _, tokens in kept],
        "responses": [list(row.responses) for row, _ in kept],
        "response_tokens": [[next(following) for _ in row.responses] for row, _ in kept],
        "ranks": [list(row.ranks) for row, _ in kept],
    }
    return _counted("comparisons", columns, {"long_prompts": len(rows) - len(kept), "cut_responses": cut})


_Row = TypeVar("_Row", bound=PromptLike)


def _within(rows: Sequence[_Row], prompts: list[list[int]], limits: TokenLimits) -> Iterator[tuple[_Row, list[int]]]:
    for row, tokens in zip(rows, prompts, strict=True):
        if not tokens:
            raise UsageProblem(f"prompt {row.prompt_id} ({row.prompt[:60]!r}) has no tokens.", "data/row")
        if len(tokens) <= limits.max_prompt_tokens:
            yield row, tokens
        elif limits.long_prompts == "refuse":
            raise UsageProblem(
                f"prompt {row.prompt_id} ({row.prompt[:60]!r}) has {len(tokens)} tokens; at most "
                f"{limits.max_prompt_tokens} fit (context {limits.context_tokens}, "
                f"responses up to {limits.max_response_tokens}).",
                "data/too-long",
            )


def _columns(kept: Sequence[tuple[object, list[int]]], names: Iterable[str]) -> dict[str, list]:
    columns = {name: [getattr(row, name) for row, _ in kept] for name in names}
    columns["meta"] = [json.dumps(meta, sort_keys=True, ensure_ascii=False) if meta else "" for meta in columns["meta"]]
    return columns


def _counted(name: TableName, columns: dict[str, list], dropped: dict[str, int]) -> pa.Table:
    table = make_table(name, columns)
    metadata = {**(schema(name).metadata or {})}
    metadata |= {f"{COUNT_KEY}{key}".encode(): str(value).encode() for key, value in dropped.items()}
    return table.replace_schema_metadata(metadata)


PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | os.PathLike[str]
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer learned from `texts`, saved to `directory` and returned.

    Its ids 0, 1, 2 are PAD, BOS and EOS; it puts BOS before plain text, and has the dialogue template. At most
    `vocab_size` ids: fewer where the texts hold fewer pairs. Any text can be written with it (every byte has an id).
    Raises UsageProblem where `vocab_size` cannot hold the 256 bytes and 3 special tokens, or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + 3:
        raise UsageProblem(
            f"vocab_size {vocab_size} is too small: 256 bytes and 3 special tokens need 259 ids.", "recipe/vocabulary"
        )
    corpus = [text for text in texts if text]
    if not corpus:
        raise UsageProblem("there is no text to learn a tokenizer from.", "data/empty")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer, length=len(corpus))
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    choose_template(tokenizer)
    tokenizer.save_pretrained(str(directory))
    return tokenizer
