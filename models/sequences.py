"""Prompts and responses side by side in one right-padded batch, with the masks that everything else reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """Rows of prompt + response, padded on the right with token 0, which no mask covers."""

    tokens: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]

    def to(self, device: str | torch.device) -> Self:
        """The same batch on `device`."""
        return type(self)(self.tokens.to(device), self.attention_mask.to(device), self.response_mask.to(device))


def sequence_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int | None = None
) -> SequenceBatch:
    """One row for each prompt and its response; as wide as the longest row, or `width` where it is given."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    width = max(lengths, default=1) if width is None else width
    tokens = np.zeros((len(lengths), width), dtype=np.int64)
    attention = np.zeros((len(lengths), width), dtype=bool)
    response_mask = np.zeros((len(lengths), width), dtype=bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : lengths[row]] = response
        attention[row, : lengths[row]] = True
        response_mask[row, len(prompt) : lengths[row]] = True
    return SequenceBatch(torch.from_numpy(tokens), torch.from_numpy(attention), torch.from_numpy(response_mask))
