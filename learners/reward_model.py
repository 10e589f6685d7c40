"""Reward-model training on rankings: all K responses to a prompt are one batch element (InstructGPT, section 3.5)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from corpus.problems import UsageProblem
from corpus.schemas import read_table
from corpus.stored_directory import StoredDirectory
from learners.batching import microbatches, pad_tokens
from learners.engine import Engine, EngineSettings
from learners.exports import whole_directory
from learners.process_group import device, process_group, sum_over_ranks
from learners.reward_model_settings import RewardModelSettings
from learners.rows import list_values
from learners.supervised import SupervisedLoop
from learners.tracking import Tracked
from learners.worker import Reporter, Worker
from models.build import context_length, load_tokenizer, set_residual_dropout
from models.scalar_head import ScalarHeadModel, last_token_scores
from objectives.ranking import pair_counts, ranking_loss


@dataclass(frozen=True)
class RewardModelJob:
    """What the stage reads and where it writes. Paths are absolute: workers change directory."""

    stage: str
    identity: str
    """Hash of all that the stage reads; only a checkpoint of the same identity is continued."""
    settings: RewardModelSettings
    engine: EngineSettings
    seed: int
    directory: Path
    start: str
    """Hugging Face directory or name of the causal language model (SFT) whose backbone is trained."""
    tokenizer: str
    comparisons: Path
    comparisons_valid: Path | None
    demonstrations: Path | None
    """Demonstrations that are to score 0 on average; None leaves the bias that training gave."""
    stored: StoredDirectory | None = None
    """Where an object store keeps the run; None where the directory itself is the run's."""
    tracked: Tracked | None = None
    """The tracker that metrics go to beside files; None for none."""


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt: full sequences, and the labeler's ranks (0 best, equal is a tie)."""

    sequences: list[np.ndarray]
    ranks: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence) for sequence in self.sequences)


def train_reward_model(job: RewardModelJob, worker: Worker) -> dict[str, Any]:
    """Trains, writes metrics and `job.directory`/export, and returns the results, the same on every rank.

    Results: `directory` (relative), `bias` (added to the head's after training), `rankings` trained on and `tied` ones
    left out, with validation data `valid_accuracy` (share of untied pairs ordered as labeled, equal scores count half),
    `valid_loss`, `valid_pairs`; and the figures of `SupervisedLoop.run`. Raises as `train_language_model`.
    """
    with process_group():
        tokenizer = load_tokenizer(job.tokenizer)
        model = ScalarHeadModel.from_causal_lm(job.start, job.seed)
        set_residual_dropout(model.backbone, 0.0)
        engine = Engine(model, job.engine, job.settings.optimizer, job.seed)
        try:
            scorer = SequenceScorer(engine, cast(int, tokenizer.pad_token_id), job.engine.tokens_per_microbatch, worker)
            task = _RewardModelTask(job, engine, scorer, worker, context_length(model.config))
            loop = SupervisedLoop(
                task,
                engine,
                job.settings.optimizer,
                worker,
                job.directory,
                job.identity,
                job.settings.checkpoint_seconds,
                job.stored,
                job.tracked,
            )
            figures = loop.run()
            bias = task.demonstration_bias()
            weights = engine.weights()
            if worker.rank == 0:
                worker.check_lease()
                with whole_directory(job.directory / "export") as directory:
                    model.save_reward_model(directory, tokenizer, bias, weights)
            parameters = sum(weight.numel() for weight in weights.values())
        finally:
            engine.close()
    return {"directory": "export", "bias": bias, **task.results, "parameters": parameters, **figures}


def read_rankings(table: pa.Table) -> tuple[list[Ranking], int]:
    """The rankings of a comparisons table that have an untied pair, and how many had none."""
    prompts = list_values(table["prompt_tokens"])
    rankings = [
        Ranking([np.concatenate([prompt, np.asarray(response, np.int32)]) for response in responses], ranks)
        for prompt, responses, ranks in zip(
            prompts, table["response_tokens"].to_pylist(), table["ranks"].to_pylist(), strict=True
        )
    ]
    untied = [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]
    return untied, len(rankings) - len(untied)


class SequenceScorer:
    """Scores sequences with the engine's ScalarHeadModel; all ranks share the work."""

    def __init__(self, engine: Engine, pad_id: int, tokens_per_microbatch: int, worker: Worker) -> None:
        self._engine, self._pad_id, self._budget, self._worker = engine, pad_id, tokens_per_microbatch, worker

    def scores(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """The number at the last token of each sequence, in the engine's mode and with gradient: float32 [rows].

        An empty list gives one score, of a dummy row for ZeRO's collectives: the caller weights it 0.
        """
        tokens, mask = pad_tokens(sequences or [np.zeros(1, np.int32)], self._pad_id)
        tokens, mask = tokens.to(device()), mask.to(device())
        values = self._engine(tokens=tokens, attention_mask=mask)
        return last_token_scores(values, mask)

    @torch.no_grad()
    def score_sequences(self, sequences: Sequence[np.ndarray], reporter: Reporter) -> np.ndarray:
        """Scores of all sequences in their order, without gradient and dropout, the same on every rank: float64."""
        self._engine.module.eval()
        lengths = [len(sequence) for sequence in sequences]
        found = torch.zeros(len(sequences), dtype=torch.float64)
        done = 0
        tokens = lengths if self._engine.packs_rows else None
        for batch in microbatches(lengths, self._budget, self._worker.rank, self._worker.world_size, tokens=tokens):
            scores = self.scores([sequences[i] for i in batch])
            if batch:
                found[batch] = scores.double().cpu()
            done += len(batch) * self._worker.world_size
            reporter.report(done)
        return np.array(sum_over_ranks(*found.tolist()))


class _RewardModelTask:
    """Minibatches of rankings in an order that seed and epoch give."""

    def __init__(
        self, job: RewardModelJob, engine: Engine, scorer: SequenceScorer, worker: Worker, context: int | None
    ) -> None:
        self._job, self._engine, self._scorer, self._worker = job, engine, scorer, worker
        settings = job.settings
        self._rankings, tied = self._read(job.comparisons, context)
        self._validation = self._read(job.comparisons_valid, context)[0][: settings.validation_rankings]
        if not self._rankings:
            raise UsageProblem(
                f"{job.stage}: every ranking in {job.comparisons} is a tie; there is nothing to learn.", "data/all-ties"
            )
        self._steps_per_epoch = math.ceil(len(self._rankings) / settings.batch_prompts)
        self.stage = job.stage
        self.total_steps = settings.epochs * self._steps_per_epoch
        self.results: dict[str, Any] = {"rankings": len(self._rankings), "tied": tied}

    def losses(self, step: int) -> Iterator[Tensor]:
        minibatch = self._minibatch(step)
        self._engine.module.train()
        for batch in self._microbatches(minibatch):
            sequences, ranks, prompts = _flat(batch)
            scores = self._scorer.scores(sequences)
            yield self._loss(scores, ranks, prompts, len(minibatch)) if batch else 0.0 * scores.sum()

    def _loss(self, scores: Tensor, ranks: Tensor, prompts: Tensor, rankings: int) -> Tensor:
        ties_count = self._job.settings.normalised_by == "all_pairs"
        return ranking_loss(scores, ranks, prompts, rankings, ties_count)

    def tokens(self, step: int) -> int:
        return sum(len(sequence) for ranking in self._minibatch(step) for sequence in ranking.sequences)

    def after_step(self, steps_done: int) -> dict[str, float]:
        values = {"epoch": steps_done / self._steps_per_epoch}
        count = self._job.settings.evaluations
        due = {math.ceil(self.total_steps * i / count) for i in range(1, count + 1)}
        if self._validation and steps_done in due:
            found = self._validate()
            self.results |= {f"valid_{name}": value for name, value in found.items()}
            values |= {f"valid/{name}": value for name, value in found.items()}
        return values

    def demonstration_bias(self) -> float:
        """Minus the mean score of demonstrations, which then score 0 on average; 0 without demonstrations."""
        if self._job.demonstrations is None:
            return 0.0
        table = read_table(self._job.demonstrations, "demonstrations")
        order = np.random.default_rng([self._job.seed]).permutation(len(table))
        table = table.take(np.sort(order[: self._job.settings.bias_demonstrations]))
        prompts, responses = list_values(table["prompt_tokens"]), list_values(table["response_tokens"])
        sequences = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
        reporter = Reporter(self._worker, f"{self.stage}: demonstrations", len(sequences), "sequences")
        return -float(self._scorer.score_sequences(sequences, reporter).mean())

    def _read(self, path: Path | None, context: int | None) -> tuple[list[Ranking], int]:
        if path is None:
            return [], 0
        rankings, tied = read_rankings(read_table(path, "comparisons"))
        for i, ranking in enumerate(rankings):
            if context is not None and ranking.longest > context:
                raise UsageProblem(
                    f"{path}: ranking {i} has {ranking.longest} tokens; the model reads {context}.", "data/too-long"
                )
        return rankings, tied

    def _minibatch(self, step: int) -> list[Ranking]:
        size = self._job.settings.batch_prompts
        epoch, place = divmod(step, self._steps_per_epoch)
        order = np.random.default_rng([self._job.seed, epoch]).permutation(len(self._rankings))
        return [self._rankings[i] for i in order[place * size : (place + 1) * size]]

    def _microbatches(self, minibatch: list[Ranking]) -> list[list[Ranking]]:
        """This rank's micro-batches; the responses to a prompt stay together."""
        tokens = [sum(map(len, ranking.sequences)) for ranking in minibatch]
        cut = microbatches(
            [ranking.longest for ranking in minibatch],
            self._job.engine.tokens_per_microbatch,
            self._worker.rank,
            self._worker.world_size,
            rows=[len(ranking.sequences) for ranking in minibatch],
            tokens=tokens if self._engine.packs_rows else None,
        )
        return [[minibatch[i] for i in batch] for batch in cut]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        self._engine.module.eval()
        reporter = Reporter(self._worker, f"{self.stage}: validation", len(self._validation), "rankings")
        correct, pairs, loss, done = 0.0, 0.0, 0.0, 0
        for batch in self._microbatches(self._validation):
            sequences, ranks, prompts = _flat(batch)
            scores = self._scorer.scores(sequences)
            if batch:
                counts = pair_counts(scores, ranks, prompts)
                correct += float(counts.correct)
                pairs += float(counts.pairs)
                loss += float(self._loss(scores, ranks, prompts, len(self._validation)))
            done += len(batch) * self._worker.world_size
            reporter.report(done)
        correct, pairs, loss = sum_over_ranks(correct, pairs, loss)
        return {"accuracy": correct / pairs, "loss": loss, "pairs": pairs}


def _flat(batch: list[Ranking]) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """Sequences of all rankings in a row, with the rank of each and which ranking it belongs to: int64 [rows]."""
    sequences = [sequence for ranking in batch for sequence in ranking.sequences]
    ranks = torch.tensor([rank for ranking in batch for rank in ranking.ranks], device=device())
    prompts = torch.tensor([i for i, ranking in enumerate(batch) for _ in ranking.ranks], device=device())
    return sequences, ranks, prompts
