"""Language-model training on tokens: base (packed documents), SFT (demonstrations) and ppo-init (both mixed)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from corpus.problems import UsageProblem
from corpus.schemas import read_table
from corpus.stored_directory import StoredDirectory
from learners import rows as rows_of
from learners.batching import microbatches, pad_tokens
from learners.engine import Engine, EngineSettings
from learners.exports import whole_directory
from learners.language_model_settings import LanguageModelSettings
from learners.process_group import device, process_group, sum_over_ranks
from learners.rows import Row
from learners.supervised import SupervisedLoop
from learners.worker import Reporter, Worker
from models.build import (
    TinyLlamaSettings,
    context_length,
    load_causal_lm,
    load_tokenizer,
    match_vocabulary,
    set_residual_dropout,
    tiny_llama,
)
from models.export import export_causal_lm
from models.forward import PolicyModel
from objectives.language_model import token_cross_entropy


@dataclass(frozen=True)
class LanguageModelJob:
    """What one stage reads and where it writes. Paths are absolute: workers change directory."""

    stage: str
    identity: str
    """Hash of all that the stage reads; only a checkpoint of the same identity is continued."""
    settings: LanguageModelSettings
    engine: EngineSettings
    seed: int
    directory: Path
    tokenizer: str
    start: str | TinyLlamaSettings
    """A Hugging Face directory or name, or the shape of a model to make afresh."""
    max_new_tokens: int
    """Goes into generation_config.json of the exports."""
    demonstrations: Path | None = None
    demonstrations_valid: Path | None = None
    pretraining: Path | None = None
    pretraining_valid: Path | None = None
    stored: StoredDirectory | None = None
    """Where an object store keeps the run; None where the directory itself is the run's."""


def train_language_model(job: LanguageModelJob, worker: Worker) -> dict[str, Any]:
    """Trains, writes metrics and exports below `job.directory`, and returns the results, the same on every rank.

    Results: `exports`, a list with `directory` (relative), `epoch` (passes over the data), `steps` and, where there is
    validation data, `valid_loss` (nats a token) for each export; `parameters`; and the figures of
    `SupervisedLoop.run`. Raises UsageProblem for unusable data or model, RunProblem where the loss is not finite or
    the disk is full, Interrupted where asked to stop.
    """
    with process_group():
        tokenizer = load_tokenizer(job.tokenizer)
        model = _make_model(job, tokenizer)
        engine = Engine(PolicyModel(model), job.engine, job.settings.optimizer, job.seed)
        try:
            task = _LanguageModelTask(job, engine, tokenizer, worker)
            loop = SupervisedLoop(
                task,
                engine,
                job.settings.optimizer,
                worker,
                job.directory,
                job.identity,
                job.settings.checkpoint_seconds,
                job.stored,
            )
            figures = loop.run()
        finally:
            engine.close()
    return {**task.results, "parameters": task.parameters, **figures}


def _make_model(job: LanguageModelJob, tokenizer: PreTrainedTokenizerFast) -> Any:
    if isinstance(job.start, TinyLlamaSettings):
        ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        pad, bos, eos = cast(tuple[int, int | None, int], ids)  # load_tokenizer refuses a tokenizer without PAD or EOS
        model = tiny_llama(job.start, len(tokenizer), pad, bos, eos, job.seed)
    else:
        model = load_causal_lm(job.start)
        match_vocabulary(model, tokenizer)
    longest = context_length(model.config)
    if longest is not None and longest < job.settings.context_length:
        raise UsageProblem(
            f"{job.stage}: context_length is {job.settings.context_length}; the model reads at most {longest} tokens.",
            "recipe/lengths",
        )
    set_residual_dropout(model, job.settings.residual_dropout)
    return model


class _LanguageModelTask:
    """Minibatches of rows in an order that seed and epoch give."""

    def __init__(
        self, job: LanguageModelJob, engine: Engine, tokenizer: PreTrainedTokenizerFast, worker: Worker
    ) -> None:
        self._job, self._engine, self._tokenizer, self._worker = job, engine, tokenizer, worker
        self._pad_id = cast(int, tokenizer.pad_token_id)
        settings = job.settings
        length = settings.context_length
        self._demonstrations = self._read(job.demonstrations, "demonstrations", length)
        texts = [] if job.pretraining is None else rows_of.documents(read_table(job.pretraining, "pretraining"))
        # A document of one token has nothing to predict; left in, it would make some mixed epochs shorter than others.
        self._texts = [text for text in texts if len(text) > 1] if job.demonstrations is not None else texts
        self._validation = self._read(job.demonstrations_valid, "demonstrations", length)
        if not self._demonstrations and job.pretraining_valid is not None:
            table = read_table(job.pretraining_valid, "pretraining")
            self._validation = rows_of.packed(rows_of.documents(table), length)
        self._validation = self._validation[: settings.validation_rows]
        if settings.pretraining_share > 0 and not (self._demonstrations and self._texts):
            raise UsageProblem(
                f"{job.stage}: a pretraining share needs both demonstrations and pretraining documents.", "data/empty"
            )
        self._steps_per_epoch = math.ceil(len(self._epoch(0)) / settings.batch_size)
        if self._steps_per_epoch == 0:
            raise UsageProblem(f"{job.stage}: there is nothing to train on.", "data/empty")
        self._epoch_of = lru_cache(maxsize=2)(self._epoch)
        self.stage = job.stage
        self.total_steps = settings.steps or settings.epochs * self._steps_per_epoch
        self.results: dict[str, Any] = {"exports": []}
        self.parameters = sum(weight.numel() for weight in engine.weights().values())

    def losses(self, step: int) -> Iterator[Tensor]:
        minibatch = self._minibatch(step)
        targets = sum(row.targets for row in minibatch)
        self._engine.module.train()
        for batch in self._microbatches(minibatch):
            yield token_cross_entropy(*self._logprobs(batch), targets)

    def tokens(self, step: int) -> int:
        return sum(len(row.tokens) for row in self._minibatch(step))

    def after_step(self, steps_done: int) -> dict[str, float]:
        values = {"epoch": steps_done / self._steps_per_epoch}
        at_end = steps_done == self.total_steps
        epoch_ends = steps_done % self._steps_per_epoch == 0
        if not (at_end or epoch_ends):
            return values
        if self._validation:
            values["valid/loss"] = self._validation_loss()
        if at_end or self._job.settings.keep_epochs:
            self._export(steps_done, values)
        return values

    def _read(self, path: Path | None, name: str, length: int) -> list[Row]:
        return [] if path is None else rows_of.demonstrations(read_table(path, "demonstrations"), length)

    def _epoch(self, epoch: int) -> list[Row]:
        """All rows of an epoch, in its order."""
        settings = self._job.settings
        random = np.random.default_rng([self._job.seed, epoch])
        if not self._demonstrations:
            texts = [self._texts[i] for i in random.permutation(len(self._texts))]
            chosen = rows_of.packed(texts, settings.context_length)
        else:
            mixed = round(len(self._demonstrations) * settings.pretraining_share / (1 - settings.pretraining_share))
            # a fresh stretch of one fixed order each epoch, so that documents repeat as late as possible
            order = np.random.default_rng([self._job.seed]).permutation(len(self._texts)) if mixed else []
            texts = [self._texts[order[(epoch * mixed + i) % len(order)]] for i in range(mixed)]
            chosen = self._demonstrations + rows_of.truncated(texts, settings.context_length)
        return [chosen[i] for i in random.permutation(len(chosen))]

    def _minibatch(self, step: int) -> list[Row]:
        size = self._job.settings.batch_size
        start = step % self._steps_per_epoch * size
        return self._epoch_of(step // self._steps_per_epoch)[start : start + size]

    def _microbatches(self, minibatch: list[Row]) -> list[list[Row]]:
        """This rank's micro-batches."""
        lengths = [len(row.tokens) for row in minibatch]
        budget = self._job.engine.tokens_per_microbatch
        tokens = lengths if self._engine.packs_rows else None
        cut = microbatches(lengths, budget, self._worker.rank, self._worker.world_size, tokens=tokens)
        return [[minibatch[i] for i in batch] for batch in cut]

    def _logprobs(self, batch: list[Row]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and mask of the targets: [rows, time − 1]. An empty micro-batch is one row without any."""
        tokens, mask = pad_tokens([row.tokens for row in batch] or [np.zeros(2, np.int32)], self._pad_id)
        starts = torch.tensor([row.first_target for row in batch] or [2])
        targets = mask.bool() & (torch.arange(tokens.shape[1]) >= starts[:, None])
        place = device()
        tokens, mask, targets = tokens.to(place), mask.to(place), targets.to(place)
        logprobs, _ = self._engine(tokens=tokens, attention_mask=mask, target_mask=targets)
        return logprobs, targets[:, 1:]

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Nats a target token."""
        self._engine.module.eval()
        reporter = Reporter(self._worker, f"{self.stage}: validation", len(self._validation), "sequences")
        targets = sum(row.targets for row in self._validation)
        total, done = 0.0, 0
        for batch in self._microbatches(self._validation):
            total += float(token_cross_entropy(*self._logprobs(batch), targets))
            done += len(batch) * self._worker.world_size
            reporter.report(done)
        [total] = sum_over_ranks(total)
        return total

    def _export(self, steps_done: int, values: dict[str, float]) -> None:
        epoch = math.ceil(steps_done / self._steps_per_epoch)
        name = f"epoch-{epoch:02d}" if self._job.settings.keep_epochs else "export"
        weights = self._engine.weights()
        if self._worker.rank == 0:
            module = self._engine.module
            assert isinstance(module, PolicyModel)
            self._worker.check_lease()
            with whole_directory(self._job.directory / name) as directory:
                export_causal_lm(directory, module.config, weights, self._tokenizer, self._job.max_new_tokens)
        entry: dict[str, Any] = {"directory": name, "epoch": values["epoch"], "steps": steps_done}
        if "valid/loss" in values:
            entry["valid_loss"] = values["valid/loss"]
        self.results["exports"].append(entry)
