"""A small network, two losses as PPO-ptx accumulates them, and the plain PyTorch that engines are held against."""

import torch
from torch import Tensor, nn

from learners.optimizer import OptimizerSettings

GAMMA = 27.8
ROWS = 6
STEPS = 5


class TinyNetwork(nn.Module):
    """Shapes whose sizes are no multiple of two ranks, so that sharding has to pad."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.inner = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.embedding(tokens)))))


def pieces(network, step: int, kind: int, piece: int, count: int) -> Tensor:
    """Piece `piece` of `count` of a loss of minibatch `step`: a PPO-like ratio loss (kind 0) or γ × ptx-like (kind 1).

    Divided by the rows of the whole minibatch, so that the pieces add up to its mean.
    """
    generator = torch.Generator().manual_seed(10 * step + kind)
    tokens = torch.randint(0, 11, (ROWS,), generator=generator)
    targets = torch.randint(0, 11, (ROWS,), generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    rows = slice(piece * ROWS // count, (piece + 1) * ROWS // count)
    logits = network(tokens[rows]).float()
    logprobs = -nn.functional.cross_entropy(logits, targets[rows], reduction="none")
    if kind == 1:
        return -GAMMA * logprobs.sum() / ROWS
    ratio = (logprobs + 2.4).exp()
    return -torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows]).sum() / ROWS


def accumulated_losses(network, step: int) -> Tensor:
    return pieces(network, step, 0, 0, 1) + pieces(network, step, 1, 0, 1)


def train_plain(network: nn.Module, settings: OptimizerSettings) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and gradient norms of `STEPS` steps in one process of plain PyTorch."""
    groups = [
        {"params": [p for p in network.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in network.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=settings.eps)
    norms = []
    for step in range(STEPS):
        adam.zero_grad()
        for kind in (0, 1):
            pieces(network, step, kind, 0, 1).backward()
        limit = settings.gradient_clip if settings.gradient_clip is not None else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), limit)))
        adam.step()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}, norms
