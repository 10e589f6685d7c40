"""The sequences that a language model is trained on, from the Arrow tables: which tokens, and where the loss begins."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from corpus.problems import UsageProblem


@dataclass(frozen=True)
class Row:
    """One sequence. The loss counts tokens from index `first_target` on; the first token is never predicted."""

    tokens: np.ndarray
    first_target: int

    @property
    def targets(self) -> int:
        """Number of tokens in the loss."""
        return len(self.tokens) - self.first_target


def documents(table: pa.Table) -> list[np.ndarray]:
    """The documents of a pretraining table, int32 each (views of the table's memory)."""
    return list_values(table["tokens"])


def packed(texts: list[np.ndarray], context_length: int) -> list[Row]:
    """Documents joined end to end and cut into rows of `context_length` tokens; the last is shorter.

    Documents end with EOS, which is all that separates them, as in GPT's pretraining.
    """
    if not texts:
        return []
    stream = np.concatenate(texts)
    cut = [stream[start : start + context_length] for start in range(0, len(stream), context_length)]
    return [Row(tokens, 1) for tokens in cut if len(tokens) > 1]


def truncated(texts: list[np.ndarray], context_length: int) -> list[Row]:
    """One row a document, cut off at `context_length` tokens; documents of one token are left out."""
    return [Row(text[:context_length], 1) for text in texts if len(text) > 1]


def demonstrations(table: pa.Table, context_length: int) -> list[Row]:
    """Prompt and response of each demonstration, with the loss on response tokens only.

    Raises UsageProblem where one is longer than `context_length`.
    """
    prompts, responses = list_values(table["prompt_tokens"]), list_values(table["response_tokens"])
    rows = [Row(np.concatenate([p, r]), max(1, len(p))) for p, r in zip(prompts, responses, strict=True)]
    refuse_longer(rows, context_length, "demonstration")
    return rows


def refuse_longer(rows: list[Row], context_length: int, what: str) -> None:
    """Raises UsageProblem where a row has more than `context_length` tokens."""
    for i, row in enumerate(rows):
        if len(row.tokens) > context_length:
            raise UsageProblem(
                f"{what} {i} has {len(row.tokens)} tokens; the context length is {context_length}.", "data/too-long"
            )


def list_values(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a column of lists of numbers, as numpy views."""
    rows: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        rows += [values[start:end] for start, end in pairwise(offsets)]
    return rows
