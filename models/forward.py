"""Temperature-aware log-probabilities of given tokens, and values before them.

Invariants:
- Everything is aligned with targets: column t of a result speaks of token t + 1, so shapes are [batch, time − 1],
  and the logits of a response are those at [prompt − 1 : −1].
- Logits are divided by the temperature and normalised in float32, whatever the network computes in.
- Padding, on either side, never changes what is returned for a real token.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from corpus.problems import UsageProblem
from models.packing import layout_for, use_packed_attention


class PolicyModel(nn.Module):
    """A causal language model whose forward gives log-probabilities of the tokens it is shown, not logits.

    An engine wraps this module and is called in its place, so that DeepSpeed's hooks run at every ZeRO stage.
    Parameters are named as in the causal language model with `parameter_prefix` before them; `plain_names` takes
    it off a whole mapping.
    """

    parameter_prefix = "causal_lm."

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        self.causal_lm = causal_lm

    @property
    def _unembedding(self) -> nn.Module:
        unembedding = self.causal_lm.get_output_embeddings()
        if unembedding is None:
            raise UsageProblem(
                f"{type(self.causal_lm).__name__} has no unembedding; give a causal language model.", "model/kind"
            )
        return unembedding

    @property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration of the language model."""
        return self.causal_lm.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in backward; takes effect in training mode only."""
        self.causal_lm.gradient_checkpointing_enable(**kwargs)

    def pack_rows(self) -> bool:
        """Leave padding out from now on, where the network's type allows it (models.packing); whether it does."""
        return use_packed_attention(self.causal_lm)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        target_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Float[Tensor, "batch time-1"], Float[Tensor, "batch time-1"] | None]:
        """Log-probabilities in float32 of the tokens where `target_mask` is set, 0 elsewhere; and the entropy in
        nats of the distribution each was drawn from, or None where it is not asked for; it carries a gradient only
        with `entropy_gradient` (for an entropy bonus).

        Logits are made for targets only: the unembedding's input is cut down to the positions before them. A batch
        without any target gives zeros whose gradient is zero for every parameter. The first token is never a target.
        """
        targets = target_mask[:, 1:].bool()
        arguments, places = call_arguments(self.causal_lm, tokens, attention_mask)
        before = places[:, :-1][targets]

        def keep_positions_before_targets(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, 1)[before].unsqueeze(0), *args[1:])

        # A hook, because what a network does after its unembedding (soft caps, scales) then still applies.
        hook = self._unembedding.register_forward_pre_hook(keep_positions_before_targets)
        try:
            output = self.causal_lm(use_cache=False, **arguments)
        finally:
            hook.remove()
        logits = output.logits[0].float()
        if temperature != 1.0:
            logits = logits / temperature
        logprobs = -F.cross_entropy(logits, tokens[:, 1:][targets], reduction="none")
        entropy = None
        if with_entropy:
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                # Bounded below, so that a token that cannot come adds 0 and not 0·∞, to the gradient neither.
                every = logits.log_softmax(-1).clamp(min=-1e4)
                entropy = _scatter(-(every.exp() * every).sum(-1), targets)
        return _scatter(logprobs, targets), entropy


def causal_logprobs(
    policy: Callable[..., Any],
    tokens: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "batch time-1"], Float[Tensor, "batch time-1"]]:
    """Log-probabilities and entropies of every real token after the first; 0 at pads and at the first real token.

    `policy` is a `PolicyModel` or an engine around one.
    """
    real = attention_mask.bool()
    followed = torch.zeros_like(real)
    followed[:, 1:] = real[:, 1:] & real[:, :-1]
    return policy(
        tokens=tokens,
        attention_mask=attention_mask,
        target_mask=followed,
        temperature=temperature,
        with_entropy=True,
    )


def response_logprobs(
    policy: Callable[..., Any],
    tokens: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    response_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    temperature: float = 1.0,
) -> Float[Tensor, "batch time-1"]:
    """Log-probabilities of response tokens, 0 elsewhere: align masks with `response_mask[:, 1:]`."""
    return policy(tokens=tokens, attention_mask=attention_mask, target_mask=response_mask, temperature=temperature)[0]


def response_values(
    value_model: Callable[..., Any],
    tokens: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    response_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time-1"]:
    """The value of the state before each response token (read at the token before it), 0 elsewhere.

    `value_model` is a `ScalarHeadModel` or an engine around one. Aligned with `response_logprobs`.
    """
    values = value_model(tokens=tokens, attention_mask=attention_mask)[:, :-1]
    return torch.where(response_mask[:, 1:].bool(), values, 0.0)


def position_ids(
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
) -> Int[Tensor, "batch time"]:
    """Exclusive cumulative sum of the mask: [t, PAD, PAD, a, b, c] → [0, 1, 1, 1, 2, 3] (inherited from N+)."""
    mask = attention_mask.long()
    return mask.cumsum(-1) - mask


def call_arguments(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
) -> tuple[dict[str, Tensor], Int[Tensor, "batch time"]]:
    """What `model` is called with to read `tokens`, and where each of them is in its flattened output (−1: nowhere).

    Padding is left out where the model can read packed rows.
    """
    layout = layout_for(model, attention_mask)
    if layout is not None:
        return layout.arguments(tokens), layout.places
    places = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    return {"input_ids": tokens, **mask_arguments(model, attention_mask)}, places


def mask_arguments(
    model: PreTrainedModel, attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]
) -> dict[str, Tensor]:
    """The attention mask, and position ids where the architecture takes them, for a call of `model`.

    Pads that only follow real tokens are invisible to these under causal attention, so they are left unmasked: plain
    causal attention runs on the fast kernels. A model whose configuration is not causal gets the mask as it is.
    """
    mask = attention_mask.long()
    right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
    if right_padded and getattr(model.config, "is_causal", True):
        mask = torch.ones_like(mask)
    arguments = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = position_ids(mask)
    return arguments


def plain_names(module: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`named` (weights or moments by parameter name of `module`) with the wrapper's `parameter_prefix` taken off.

    A module without a prefix gives the names back unchanged.
    """
    prefix = getattr(module, "parameter_prefix", "")
    return {name.removeprefix(prefix): tensor for name, tensor in named.items()}


def _scatter(chosen: Float[Tensor, " targets"], targets: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    return torch.zeros(targets.shape, dtype=chosen.dtype, device=chosen.device).masked_scatter(targets, chosen)
