"""Rows of unequal lengths as one row without padding, for everything in a network but attention.

A batch of [rows, time] tokens becomes one row of its real tokens; embeddings, projections, norms and MLPs then work on
real tokens only. Attention alone must know which token belongs to which row. It gets a table of places instead of a
mask, spreads queries, keys and values out to [rows, time], attends causally on the kernels that need no mask, and puts
the result back into one row. Transformers hands such a table through: a mask of four dimensions reaches attention
untouched, whatever is in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "amenable_packed"
"""The name under which Transformers knows our attention function."""

PACKABLE_TYPES = frozenset({"gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Model types whose tokens meet in attention alone, which is causal and full: those that the tests compare. A
convolution, a recurrent state or an expert's capacity would mix one row's tokens into the next."""

LENGTH_STEP = 64
"""The packed row is filled up to a multiple of this many tokens: its shapes then recur. On CPUs oneDNN compiles a
bfloat16 product anew for every shape that it has not met, which costs as much as the product itself."""


@dataclass(frozen=True)
class Layout:
    """How a right-padded batch [rows, time] lies in one packed row, which ends with copies of its first token."""

    places: Int[Tensor, "rows time"]
    """Index into the packed row of each token; −1 at pads."""
    tokens: int
    """Length of the packed row."""

    @classmethod
    def of(cls, real: Bool[Tensor, "rows time"]) -> "Layout":
        """The layout of a batch whose real tokens are marked by `real`."""
        places = (real.flatten().cumsum(0) - 1).view(real.shape).masked_fill(~real, -1)
        return cls(places, -(-int(real.sum()) // LENGTH_STEP) * LENGTH_STEP)

    def arguments(self, tokens: Int[Tensor, "rows time"]) -> dict[str, Tensor]:
        """What a packable model is called with to read `tokens`."""
        rows, time = tokens.shape
        homes = _homes(self.places, self.tokens).clamp(min=0)
        return {
            "input_ids": tokens.flatten()[homes][None],
            "position_ids": torch.arange(time, device=tokens.device).repeat(rows)[homes][None],
            "attention_mask": self.places[None, None],
        }


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Let `model` read packed rows, where its type can, and say whether it can. Plain batches give what they gave."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    plain = window is None and getattr(config, "is_causal", True) and config._attn_implementation == "sdpa"
    if config.model_type in PACKABLE_TYPES and plain:
        model.set_attn_implementation(ATTENTION)
    return packs(model)


def packs(model: PreTrainedModel) -> bool:
    """Whether `model` reads packed rows."""
    return model.config._attn_implementation == ATTENTION


def layout_for(
    model: PreTrainedModel, attention_mask: Int[Tensor, "rows time"] | Bool[Tensor, "rows time"]
) -> Layout | None:
    """The layout of a batch for `model`; None where it cannot be packed, or would not be shorter for it."""
    real = attention_mask.bool()
    right_padded = bool((real[:, 1:] <= real[:, :-1]).all())
    if not right_padded or not packs(model):
        return None
    layout = Layout.of(real)
    return layout if 0 < layout.tokens < real.numel() else None


def _attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads time size"],
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention, in which a mask of int64 is a table of places."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    places = attention_mask[0, 0]
    homes = _homes(places, query.shape[2])
    query, key, value = (_Spread.apply(part, places, homes) for part in (query, key, value))
    attended, _ = sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})
    return _Gather.apply(attended, places, homes), None  # pyright: ignore[reportReturnType]


def _homes(places: Int[Tensor, "rows time"], tokens: int) -> Int[Tensor, " tokens"]:
    """The inverse of `places`: index into the flattened batch of every packed token; −1 at those that fill up."""
    homes = torch.full((tokens + 1,), -1, device=places.device)
    cells = torch.arange(places.numel(), device=places.device)
    return homes.scatter_(0, places.flatten() % (tokens + 1), cells)[:-1]  # pads go to the last one, cut off


# The two ways between the layouts are each other's gradient. Written out because the gradient of indexing is a sum over
# equal indices, which is slow on CPUs and in no fixed order on GPUs.


class _Spread(torch.autograd.Function):
    """[1, heads, tokens, size] → [rows, heads, time, size]; anything at pads, which no real token attends to."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor, homes: Tensor) -> Tensor:
        ctx.save_for_backward(homes)
        return packed[0].transpose(0, 1)[places.clamp(min=0)].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (homes,) = ctx.saved_tensors
        return _taken(gradients[0].transpose(1, 2).flatten(0, 1), homes).transpose(0, 1)[None], None, None


class _Gather(torch.autograd.Function):
    """[rows, time, heads, size] → [1, tokens, heads, size]; whatever is in the first cell for tokens that fill up."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, places: Tensor, homes: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return spread.flatten(0, 1)[homes.clamp(min=0)][None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _taken(gradients[0][0], places), None, None


def _taken(values: Tensor, indices: Int[Tensor, "..."]) -> Tensor:
    """`values[indices]`, and 0 where an index is −1."""
    return values[indices.clamp(min=0)].masked_fill_((indices < 0)[..., None, None], 0.0)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
