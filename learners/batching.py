"""Cutting a minibatch into padded micro-batches that fit a token budget and keep all ranks in step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WIDTH_STEP = 8
"""PPO's micro-batches are as wide as a multiple of this many tokens: their shapes then recur. On CPUs oneDNN compiles a
bfloat16 product anew for every shape that it has not met, which costs as much as the product itself."""

PADDED_LIMIT = 4
"""Where networks leave padding out, attention alone still works on padded rows (models.packing): this many times the
budget at most, so that one long row among many short ones does not take memory without bound."""


def padded_width(longest: int, limit: int) -> int:
    """The next multiple of WIDTH_STEP from `longest` tokens up, but at most `limit` (a context, a table's width)."""
    return min(-(-longest // WIDTH_STEP) * WIDTH_STEP, limit)


def microbatches(
    lengths: Sequence[int],
    tokens_per_microbatch: int,
    rank: int,
    world_size: int,
    rows: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[list[int]]:
    """This rank's micro-batches of a minibatch of examples that have `lengths` tokens: lists of indices.

    An example is one row, or `rows[i]` rows that must stay together, the longest of `lengths[i]` tokens. Examples are
    sorted by length (longest first, ties by index), dealt over the ranks so that each gets about the same tokens, and
    cut so that rows × longest row ≤ `tokens_per_microbatch`; an example that alone exceeds it is a micro-batch of its
    own. For networks that leave padding out, `tokens` gives the tokens of each example's rows together; the budget is
    then for their sum, and rows × longest may be `PADDED_LIMIT` times as much.

    Over all ranks every example appears exactly once, and every rank gets the **same number** of micro-batches,
    because ZeRO's collectives must be entered by all: where a rank has too few examples the list is empty, and the
    caller runs a dummy row of weight 0. A pure function of its arguments, so ranks need not talk to agree.
    """
    rows = [1] * len(lengths) if rows is None else rows
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = [
        _cut([order[i] for i in _dealt(len(order), r, world_size)], lengths, rows, tokens_per_microbatch, tokens)
        for r in range(world_size)
    ]
    count = max(len(share) for share in shares)
    return _spread(shares[rank], count)


def _dealt(examples: int, rank: int, world_size: int) -> list[int]:
    """Positions of the sorted order that `rank` gets, dealt there and back (0 1 2 2 1 0 …) to even out tokens."""
    there_and_back = [*range(world_size), *reversed(range(world_size))]
    return [i for i in range(examples) if there_and_back[i % (2 * world_size)] == rank]


def _cut(
    order: list[int], lengths: Sequence[int], rows: Sequence[int], budget: int, tokens: Sequence[int] | None
) -> list[list[int]]:
    """Examples, longest first, in as few micro-batches as the budget allows greedily."""
    limit = budget if tokens is None else PADDED_LIMIT * budget
    batches: list[list[int]] = []
    used, real = 0, 0
    for i in order:
        own = 0 if tokens is None else tokens[i]
        # sorted: the first example of a micro-batch is its longest
        if batches and lengths[batches[-1][0]] * (used + rows[i]) <= limit and real + own <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            used, real = 0, 0
        used += rows[i]
        real += own
    return batches


def _spread(batches: list[list[int]], count: int) -> list[list[int]]:
    """The same examples in exactly `count` micro-batches: the largest are halved, then empty ones are added."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if largest is None or len(batches[largest]) < 2:
            batches.append([])
            continue
        full = batches[largest]
        batches[largest : largest + 1] = [full[: len(full) // 2], full[len(full) // 2 :]]
    return batches


def pad(
    rows: Sequence[Sequence[float]] | Sequence[np.ndarray],
    pad_value: float,
    dtype: torch.dtype,
    width: int | None = None,
) -> Tensor:
    """Rows right-padded to `width`, or to the longest: [rows, width] of `dtype`."""
    padded = np.full((len(rows), width or max(len(row) for row in rows)), pad_value)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded).to(dtype)


def pad_tokens(rows: Sequence[Sequence[int]] | Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded tokens and their attention mask, both int64 of shape [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad(rows, pad_id, torch.int64)
    return tokens, (torch.arange(tokens.shape[1])[None] < lengths[:, None]).to(torch.int64)
