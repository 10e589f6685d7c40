"""Cutting a minibatch into padded micro-batches that fit a token budget and keep all ranks in step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def microbatches(lengths: Sequence[int], tokens_per_microbatch: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's micro-batches of a minibatch whose rows have `lengths` tokens: lists of row indices.

    Rows are sorted by length (longest first, ties by index), dealt over the ranks so that each gets about the same
    tokens, and cut so that rows × longest row ≤ `tokens_per_microbatch`; a single longer row is a micro-batch of its
    own. Over all ranks every row appears exactly once, and every rank gets the **same number** of micro-batches,
    because ZeRO's collectives must be entered by all: where a rank has too few rows the list is empty, and the
    caller runs a dummy row of weight 0. A pure function of its arguments, so ranks need not talk to agree.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares = [
        _cut([order[i] for i in _dealt(len(order), r, world_size)], lengths, tokens_per_microbatch)
        for r in range(world_size)
    ]
    count = max(len(share) for share in shares)
    return _spread(shares[rank], count)


def _dealt(rows: int, rank: int, world_size: int) -> list[int]:
    """Positions of the sorted order that `rank` gets, dealt there and back (0 1 2 2 1 0 …) to even out tokens."""
    there_and_back = [*range(world_size), *reversed(range(world_size))]
    return [i for i in range(rows) if there_and_back[i % (2 * world_size)] == rank]


def _cut(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows, longest first, in as few micro-batches as the budget allows greedily."""
    batches: list[list[int]] = []
    for row in order:
        # sorted: the first row of a micro-batch is its longest
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _spread(batches: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in exactly `count` micro-batches: the largest are halved, then empty ones are added."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if largest is None or len(batches[largest]) < 2:
            batches.append([])
            continue
        rows = batches[largest]
        batches[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return batches


def pad(rows: Sequence[Sequence[float]] | Sequence[np.ndarray], pad_value: float, dtype: torch.dtype) -> Tensor:
    """Rows right-padded to the longest: [rows, longest] of `dtype`."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), pad_value, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(np.asarray(row), dtype=dtype)
    return padded


def pad_tokens(rows: Sequence[Sequence[int]] | Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded tokens and their attention mask, both int64 of shape [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad(rows, pad_id, torch.int64)
    return tokens, (torch.arange(tokens.shape[1])[None] < lengths[:, None]).to(torch.int64)
