"""The language-model loss: of base training, of SFT on response tokens, and of the pretraining term of PPO-ptx."""

from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import masked_sum


def token_cross_entropy(
    logprobs: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], global_tokens: float
) -> Float[Tensor, ""]:
    """−Σ log-prob over the tokens of `mask`, divided by such tokens in the GLOBAL batch: nats a token.

    Summed over micro-batches and ranks it is the mean over the whole. For PPO-ptx multiply it by γ and add its gradient
    to PPO's before the one optimiser step (InstructGPT, appendix C.4).
    """
    return -masked_sum(logprobs, mask) / global_tokens
