"""One PPO update: every minibatch once, its PPO gradient and γ times its pretraining gradient, then one step.

Sums are divided by the tokens of the global minibatch, so gradients do not depend on how it is cut into micro-batches
and dealt over ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from corpus.problems import RunProblem
from learners.batching import microbatches, padded_width
from learners.engine import Engine
from learners.ppo_batch import EpisodeBatch, Rewards, minibatch_rows, padded_rows, summed_over_ranks
from learners.ppo_settings import PpoSettings
from learners.process_group import device, sum_over_ranks
from models.forward import response_logprobs, response_values
from objectives.language_model import token_cross_entropy
from objectives.policy import PolicyDiagnostics, PolicyTokens, policy_diagnostics, policy_loss
from objectives.value import ValueTokens, value_clip_count, value_loss


class PretrainingOrder:
    """Pretraining documents in a seeded order, a new permutation each pass; a step's documents are arithmetic."""

    def __init__(self, documents: Sequence[np.ndarray], seed: int, context: int) -> None:
        self.context = context
        self._documents = [document[:context] for document in documents if len(document) > 1]
        self._seed = seed
        self._held: tuple[int, np.ndarray] | None = None
        if not self._documents:
            raise RunProblem(
                "PPO-ptx needs pretraining documents of at least two tokens, and there are none.", "data/empty"
            )

    def at(self, start: int, count: int) -> list[np.ndarray]:
        """Documents `start` to `start + count` of the endless order."""
        size = len(self._documents)
        chosen = []
        for place in range(start, start + count):
            which, index = divmod(place, size)
            chosen.append(self._documents[self._permutation(which)[index]])
        return chosen

    def _permutation(self, which: int) -> np.ndarray:
        if self._held is None or self._held[0] != which:
            self._held = (which, np.random.default_rng((self._seed, which)).permutation(len(self._documents)))
        return self._held[1]


class PpoUpdate:
    """Policy and value engines and what an update does with them. All ranks call the same methods in the same order."""

    def __init__(
        self,
        policy: Engine,
        value: Engine,
        settings: PpoSettings,
        temperature: float,
        tokens_per_microbatch: int,
        seed: int,
        pretraining: PretrainingOrder | None,
    ) -> None:
        self.policy, self.value = policy, value
        self._settings = settings
        self._temperature = temperature
        self._budget = tokens_per_microbatch
        self._seed = seed
        self._pretraining = pretraining
        self._rank, self._world = dist.get_rank(), dist.get_world_size()

    # forward passes over a whole batch --------------------------------------------------------------------------

    def values(self, batch: EpisodeBatch) -> Tensor:
        """The value network's [batch, targets], 0 off the responses."""
        rows = range(batch.rows)
        return self._whole(self.value, batch, rows, lambda s: response_values(self.value, s[0], s[1], s[2]))

    def logprobs(self, batch: EpisodeBatch, rows: Sequence[int] | None = None) -> Tensor:
        """The policy's [batch, targets] of `rows` (or all) at the rollout temperature, 0 off responses."""
        rows = range(batch.rows) if rows is None else rows
        return self._whole(
            self.policy, batch, rows, lambda s: response_logprobs(self.policy, s[0], s[1], s[2], self._temperature)
        )

    def first_minibatch(self, batch: EpisodeBatch, update: int) -> list[int]:
        """The rows that update `update` trains on first."""
        return minibatch_rows(batch.rows, self._settings.minibatches, (self._seed, update, 0))[0]

    @torch.no_grad()
    def _whole(
        self,
        engine: Engine,
        batch: EpisodeBatch,
        rows: Sequence[int],
        forward: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor],
    ) -> Tensor:
        result = torch.zeros(batch.mask.shape)
        for chosen, width in self._microbatches(engine, batch, rows):
            out = forward(_sequences(batch, chosen, width))
            if chosen:
                result[chosen, : width - 1] = out.float().cpu()
        return summed_over_ranks(result)

    def _microbatches(
        self, engine: Engine, batch: EpisodeBatch, rows: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """This rank's micro-batches of `rows` for `engine`: indices into the batch and the width they need."""
        for part, width in self._cut(engine, [batch.lengths[row] for row in rows], batch.width):
            yield [rows[index] for index in part], width

    def _cut(self, engine: Engine, lengths: Sequence[int], limit: int) -> Iterator[tuple[list[int], int]]:
        """This rank's micro-batches of rows of `lengths`: their indices and the width they are padded to."""
        widths = [padded_width(length, limit) for length in lengths]
        tokens = lengths if engine.packs_rows else None
        for part in microbatches(widths, self._budget, self._rank, self._world, tokens=tokens):
            yield part, max((widths[index] for index in part), default=2)

    # the update ----------------------------------------------------------------------------------------------------

    def run(
        self,
        batch: EpisodeBatch,
        rewards: Rewards,
        old_logprobs: Tensor,
        old_values: Tensor,
        update: int,
        after_step: Callable[[], None],
    ) -> dict[str, float]:
        """Train on `batch` for all inner epochs; returns what is logged. `update` counts from 0.

        Raises RunProblem, before the step is taken, where a loss or gradient is not finite.
        """
        settings = self._settings
        warmup = settings.critic_warmup_updates  # the policy's own schedule begins after it
        policy_lr = settings.policy.learning_rate(max(0, update - warmup), settings.updates - warmup)
        value_lr = settings.value.learning_rate(update, settings.updates)
        moves = update >= warmup
        sums: dict[str, list[float]] = {}
        # Zeros where this rank has no row of its own: all ranks add up their sums together.
        diagnostics = PolicyDiagnostics(
            torch.zeros(7, dtype=torch.float64, device=device()), torch.zeros((), dtype=torch.float64, device=device())
        )
        for epoch in range(settings.inner_epochs):
            seed = (self._seed, update, epoch)
            for index, rows in enumerate(minibatch_rows(batch.rows, settings.minibatches, seed)):
                tokens = float(batch.mask[rows].sum())
                step = (update * settings.inner_epochs + epoch) * settings.minibatches + index
                policy_share, seen = (
                    self._policy_gradients(batch, rewards, old_logprobs, rows, tokens) if moves else (0.0, None)
                )
                ptx_share = self._ptx_gradients(step, len(rows)) if moves else 0.0
                value_share, clipped = self._value_gradients(batch, rewards, old_values, rows, tokens)
                totals = sum_over_ranks(policy_share, ptx_share, value_share, clipped)
                if not np.isfinite(totals).all():
                    raise RunProblem(
                        f"ppo: at update {update + 1}, minibatch {index + 1}, the losses are policy {totals[0]}, "
                        f"ptx {totals[1]}, value {totals[2]}; lower the learning rate.",
                        "ppo/not-finite",
                    )
                values = {
                    "loss/policy_avg": totals[0],
                    "loss/ptx": totals[1],
                    "loss/value_avg": totals[2],
                    "val/clipfrac_avg": totals[3] / tokens,
                    "val/gradient_norm": self.value.step(value_lr),
                }
                if moves:
                    values["policy/gradient_norm"] = self.policy.step(policy_lr)
                    after_step()
                for name, value in values.items():
                    sums.setdefault(name, []).append(value)
                if seen is not None:
                    diagnostics = diagnostics + seen
        figures = {name: float(np.mean(values)) for name, values in sums.items()}
        figures |= {"lr": policy_lr if moves else 0.0, "lr_value": value_lr}
        if moves:
            figures |= _policy_figures(_over_ranks(diagnostics))
        return figures

    def _policy_gradients(
        self, batch: EpisodeBatch, rewards: Rewards, old_logprobs: Tensor, rows: list[int], tokens: float
    ) -> tuple[float, PolicyDiagnostics | None]:
        settings, share, seen = self._settings, 0.0, None
        behaviour = batch.behaviour_logprobs if settings.decoupled else None
        for chosen, width in self._microbatches(self.policy, batch, rows):
            sequences = _sequences(batch, chosen, width)
            logprobs, entropy = self.policy(
                tokens=sequences[0],
                attention_mask=sequences[1],
                target_mask=sequences[2],
                temperature=self._temperature,
                with_entropy=settings.entropy_coefficient > 0,
                entropy_gradient=True,
            )
            if not chosen:
                self.policy.backward(logprobs.sum() * 0.0)  # a dummy row, so that all ranks enter the same collectives
                continue
            part = slice(0, width - 1)
            micro = PolicyTokens(
                logprobs=logprobs,
                old_logprobs=old_logprobs[chosen, part].to(logprobs.device),
                advantages=rewards.advantages[chosen, part].to(logprobs.device),
                mask=batch.mask[chosen, part].to(logprobs.device),
                behaviour_logprobs=None if behaviour is None else behaviour[chosen, part].to(logprobs.device),
            )
            loss = policy_loss(micro, settings.clip, tokens, settings.importance_cap)
            if entropy is not None:
                loss = loss - settings.entropy_coefficient * entropy.sum() / tokens
            self.policy.backward(loss)
            share += loss.item()
            found = policy_diagnostics(micro, settings.clip, settings.importance_cap)
            seen = found if seen is None else seen + found
        return share, seen

    def _ptx_gradients(self, step: int, episodes: int) -> float:
        """γ × the pretraining loss of this minibatch's documents; returns this rank's share of the bare loss."""
        settings = self._settings
        if self._pretraining is None or settings.ptx_coefficient == 0:
            return 0.0
        count = episodes * settings.ptx_per_episode
        documents = self._pretraining.at(step * count, count)
        targets = sum(len(document) - 1 for document in documents)
        denominator = float(targets if settings.ptx_loss == "token_mean" else count)
        share = 0.0
        lengths = [len(document) for document in documents]
        for chosen, width in self._cut(self.policy, lengths, self._pretraining.context):
            rows = [documents[index] for index in chosen] or [np.zeros(2, dtype=np.int64)]
            tokens, mask = (part.to(device()) for part in padded_rows(rows, width))
            target = mask.clone()
            target[:, 0] = False
            logprobs, _ = self.policy(tokens=tokens, attention_mask=mask, target_mask=target)
            loss = token_cross_entropy(logprobs, target[:, 1:], denominator) * (1.0 if chosen else 0.0)
            self.policy.backward(settings.ptx_coefficient * loss)
            share += loss.item()
        return share

    def _value_gradients(
        self, batch: EpisodeBatch, rewards: Rewards, old_values: Tensor, rows: list[int], tokens: float
    ) -> tuple[float, float]:
        settings, share, clipped = self._settings, 0.0, 0.0
        for chosen, width in self._microbatches(self.value, batch, rows):
            values = response_values(self.value, *_sequences(batch, chosen, width))
            if not chosen:
                self.value.backward(values.sum() * 0.0)
                continue
            part = slice(0, width - 1)
            micro = ValueTokens(
                values=values,
                old_values=old_values[chosen, part].to(values.device),
                returns=rewards.returns[chosen, part].to(values.device),
                mask=batch.mask[chosen, part].to(values.device),
            )
            loss = value_loss(micro, settings.value_clip, tokens)
            self.value.backward(settings.value_coefficient * loss)
            share += loss.item()
            clipped += float(value_clip_count(micro, settings.value_clip))
        return share, clipped


def _sequences(batch: EpisodeBatch, rows: list[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and response mask of some rows on the device; a dummy row where there are none."""
    if not rows:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device())
        return tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    whole = batch.sequences
    parts = (whole.tokens, whole.attention_mask, whole.response_mask)
    return tuple(part[rows, :width].to(device()) for part in parts)  # pyright: ignore[reportReturnType]


def _over_ranks(diagnostics: PolicyDiagnostics) -> PolicyDiagnostics:
    if dist.get_world_size() > 1:
        dist.all_reduce(diagnostics.sums)
        dist.all_reduce(diagnostics.max_abs_log_ratio, op=dist.ReduceOp.MAX)
    return diagnostics


def _policy_figures(diagnostics: PolicyDiagnostics) -> dict[str, float]:
    figures: dict[str, Any] = diagnostics.figures()
    return {
        "policy/approxkl_avg": figures["approx_kl"],
        "policy/clipfrac_avg": figures["clip_fraction"],
        "val/ratio": figures["ratio_mean"],
        "val/ratio_var": figures["ratio_variance"],
        "policy/max_abs_log_ratio": figures["max_abs_log_ratio"],
        "policy/effective_sample_size": figures["effective_sample_size"],
    }
