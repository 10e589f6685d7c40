"""The PPO learner: take a batch, value it, update, publish, checkpoint; and again.

Stream and learner are one recovery unit: a checkpoint holds both, its manifest is the commit, and a restart returns
both to it under a new attempt.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from torch import Tensor

from actors.conductor import HeldOut, Probe, Publication
from actors.episodes import EPISODE
from actors.settings import SamplingSettings
from corpus.problems import RunProblem
from corpus.schemas import read_table
from learners.checkpoint import Checkpoint, load_newest, write_checkpoint
from learners.ema import WeightAverage
from learners.engine import MOMENTS, Engine, EngineSettings
from learners.exports import whole_directory
from learners.metrics import MetricsLog
from learners.ppo_batch import EpisodeBatch, RewardRules, episode_batch, reward_batch
from learners.ppo_settings import PpoSettings
from learners.ppo_update import PpoUpdate, PretrainingOrder
from learners.process_group import device, process_group, sum_over_ranks
from learners.rows import documents
from learners.supervised import peak_memory_bytes
from learners.worker import Interrupted, Reporter, Worker
from models.build import load_causal_lm, load_tokenizer, set_residual_dropout
from models.export import export_causal_lm
from models.forward import PolicyModel, causal_logprobs
from models.scalar_head import load_scalar
from models.sequences import sequence_batch
from models.snapshot import Snapshot, pack
from objectives.kl import AdaptiveKL, FixedKL


@dataclass(frozen=True)
class PpoJob:
    """What the PPO stage reads, where it writes, and the actors it talks to. Paths are absolute."""

    identity: str
    """Hash of all that the stage reads; only a checkpoint of the same identity is continued."""
    settings: PpoSettings
    sampling: SamplingSettings
    engine: EngineSettings
    seed: int
    directory: Path
    tokenizer: str
    policy: str
    """Directory of the initial policy, which is the reference too."""
    reward_model: str
    """Directory from which the value network starts."""
    pretraining: Path
    stream: Any
    conductor: Any
    rollout_dtype: str
    held_out: HeldOut


def train_ppo(job: PpoJob, worker: Worker) -> dict[str, Any]:
    """Trains all updates and exports policy, ema, value and best below `job.directory`; the same result on every rank.

    Raises Interrupted after a checkpoint where asked to stop; RunProblem where a loss is not finite, the engine
    disagrees with the learner, or a batch is late.
    """
    with process_group():
        policy = Engine(PolicyModel(_policy_model(job)), job.engine, job.settings.policy, job.seed)
        value = Engine(_value_model(job), job.engine, job.settings.value, job.seed + 1)
        try:
            return _PpoLoop(job, worker, policy, value).run()
        finally:
            policy.close()
            value.close()


def _policy_model(job: PpoJob) -> Any:
    model = load_causal_lm(job.policy)
    set_residual_dropout(model, 0.0)  # dropout is off in PPO (Ziegler and N+ code)
    return model


def _value_model(job: PpoJob) -> Any:
    model = load_scalar(job.reward_model)
    set_residual_dropout(model.backbone, 0.0)
    return model


@dataclass
class _Evaluation:
    """A held-out evaluation under way, with the EMA weights it speaks of."""

    update: int
    answer: Any
    weights: dict[str, Tensor]


@dataclass
class _Progress:
    """What a checkpoint carries beside tensors and the stream."""

    attempt: int = 0
    update: int = 0
    kl_coefficient: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    stopped_by: str = ""


class _PpoLoop:
    def __init__(self, job: PpoJob, worker: Worker, policy: Engine, value: Engine) -> None:
        self._job, self._worker, self._settings = job, worker, job.settings
        self._policy, self._value = policy, value
        self._tokenizer = load_tokenizer(job.tokenizer)
        self._checkpoints = job.directory / "checkpoints"
        self._reporter = Reporter(worker, "ppo", job.settings.updates, "updates")
        self._first = worker.rank == 0
        pretraining = None
        if job.settings.ptx_coefficient > 0:
            texts = documents(read_table(str(job.pretraining), "pretraining"))
            pretraining = PretrainingOrder(texts, job.seed, job.settings.ptx_context)
        self._update = PpoUpdate(
            policy,
            value,
            job.settings,
            job.sampling.temperature,
            job.engine.tokens_per_microbatch,
            job.seed,
            pretraining,
        )
        self._rules = RewardRules(
            job.settings.kl_coefficient,
            **{
                name: getattr(job.settings, name)
                for name in RewardRules.__dataclass_fields__
                if name != "kl_coefficient"
            },
        )
        self._progress = _Progress(kl_coefficient=job.settings.kl_coefficient)
        self._average = WeightAverage(policy.weights(), job.settings.ema_decay)
        self._evaluations: list[_Evaluation] = []
        self._publication: Any = None
        self._bound = job.settings.mismatch_bound_nats or _default_bound(job.engine.dtype, job.rollout_dtype)

    # the whole -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        settings, progress = self._settings, self._progress
        self._resume()
        metrics = None
        if self._first:
            metrics = MetricsLog(self._job.directory, resumed_step=progress.update or None)
        self._reporter.report(progress.update, now=True)
        started, episodes_before = time.monotonic(), progress.update
        try:
            while progress.update < settings.updates and not progress.stopped_by:
                began = time.monotonic()
                published = self._publish()
                publishing = time.monotonic() - began
                figures = self._one_update(published)
                progress.update += 1
                figures["time/publish"] = publishing
                figures["time/update"] = time.monotonic() - began
                figures["throughput/episodes_per_second"] = settings.batch_size / figures["time/update"]
                if metrics is not None:  # before the checkpoint, so that a run that goes on from it has every line
                    figures |= ray.get(self._job.stream.counts.remote())
                    metrics.log(progress.update, figures)
                last = progress.update == settings.updates or bool(progress.stopped_by)
                if self._first and (last or progress.update % settings.evaluate_every == 0):
                    self._begin_evaluation()
                stop = self._worker.agreed_to_stop()
                if not last and (stop or progress.update % settings.checkpoint_every == 0):
                    self._save()
                if stop and not last:
                    raise Interrupted(f"ppo, update {progress.update} of {settings.updates}")
                self._collect_evaluations(wait=last)
                self._reporter.report(progress.update, figures, now=True)
        finally:
            if metrics is not None:
                metrics.close()
        seconds = time.monotonic() - started
        if self._first:
            ray.get(self._job.conductor.finish.remote())
            self._export()
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        sum_over_ranks(0.0)  # nobody reports success before rank 0 has written the exports
        return {
            "updates": progress.update,
            "episodes": progress.update * settings.batch_size,
            "attempt": progress.attempt,
            "best": progress.best,
            "stopped_by": progress.stopped_by,
            "kl_coefficient": progress.kl_coefficient,
            "seconds": seconds,
            "episodes_per_second": (progress.update - episodes_before) * settings.batch_size / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _one_update(self, published: Publication | None) -> dict[str, float]:
        """Nine phases: take, value, old log-probs, mismatch, rewards, update, commit, KL controller, figures."""
        settings, progress = self._settings, self._progress
        mark = time.monotonic()
        table = self._take(progress.update)
        waited, mark = time.monotonic() - mark, time.monotonic()
        batch = episode_batch(table, progress.attempt, progress.update)
        old_values = self._update.values(batch)
        old_logprobs = self._update.logprobs(batch) if settings.old_logprobs == "recomputed" else None
        mismatch = self._mismatch(batch, old_logprobs)
        old_logprobs = batch.behaviour_logprobs if old_logprobs is None else old_logprobs
        rewards = reward_batch(batch, old_logprobs, old_values, self._rules.with_coefficient(progress.kl_coefficient))
        prepared, mark = time.monotonic() - mark, time.monotonic()
        trained = self._update.run(batch, rewards, old_logprobs, old_values, progress.update, self._after_step)
        if settings.ema_every == "update":
            self._average.update(self._policy.weights())
        if self._first:
            ray.get(self._job.stream.trained.remote(progress.update))
        kl_nats = rewards.figures["objective/kl"]
        progress.kl_coefficient = self._controller().updated(kl_nats, batch.rows).coefficient
        if settings.kl_budget_nats is not None and kl_nats > settings.kl_budget_nats:
            progress.stopped_by = f"the KL budget: {kl_nats:.2f} nats a sequence, over {settings.kl_budget_nats:g}"
        tokens = float(sum(batch.lengths))
        figures = {
            "episode": float((progress.update + 1) * settings.batch_size),
            **rewards.figures,
            **trained,
            **mismatch,
            "policy/entropy_avg": rewards.figures["objective/entropy"] / rewards.figures["response/length_mean"],
            "time/wait_for_episodes": waited,
            "time/prepare": prepared,
            "time/train": time.monotonic() - mark,
            "throughput/tokens_per_second": tokens / (time.monotonic() - mark + prepared),
            "memory/learner_bytes": float(peak_memory_bytes()),
            "staleness/straggler_age_seconds": _straggler_age(table),
        }
        if published is not None:
            figures |= {
                "sync/publish_seconds": published.seconds,
                "sync/pause_seconds": published.pause_s,
                "mismatch/probe_nats": published.probe_nats,
                **published.roles,
            }
        return figures

    # phases --------------------------------------------------------------------------------------------------------

    def _take(self, batch: int) -> pa.Table:
        """Batch `batch` from the stream; looks up every second so that progress stays alive."""
        answer = self._job.stream.take.remote(batch, self._settings.batch_deadline_s)
        while True:
            done, _ = ray.wait([answer], timeout=1.0)
            if done:
                return ray.get(answer)
            self._reporter.report(self._progress.update)

    def _mismatch(self, batch: EpisodeBatch, recomputed: Tensor | None) -> dict[str, float]:
        """Engine against learner on tokens that the learner's present weights wrote, before its first step.

        Where the learner's log-probs are computed for this alone, the first minibatch's rows have to do.
        """
        rows = list(range(batch.rows))
        if recomputed is None:
            rows = self._update.first_minibatch(batch, self._progress.update)
        own = torch.zeros_like(batch.own_version)
        own[rows] = batch.own_version[rows]
        if not own.any():
            return {}
        if recomputed is None:
            recomputed = self._update.logprobs(batch, rows)
        difference = (recomputed - batch.behaviour_logprobs)[own].abs()
        largest = difference.max().item()
        if not largest <= self._bound:
            raise RunProblem(
                f"ppo: at update {self._progress.update + 1} engine and learner disagree on the log-probability of a "
                f"token by {largest:.4g} nats, beyond the bound of {self._bound:g}; their weights, temperature or "
                "dtype differ."
            )
        return {"mismatch/max_abs_log_ratio": largest, "mismatch/mean_abs_log_ratio": difference.mean().item()}

    def _after_step(self) -> None:
        if self._settings.ema_every == "step":
            self._average.update(self._policy.weights())

    def _controller(self) -> FixedKL | AdaptiveKL:
        coefficient = self._progress.kl_coefficient
        if self._settings.kl_controller == "fixed":
            return FixedKL(coefficient)
        return AdaptiveKL(coefficient, self._settings.kl_target_nats, self._settings.kl_horizon_episodes)

    # publication ---------------------------------------------------------------------------------------------------

    def _publish(self) -> Publication | None:
        """Bring the present weights into the engines; returns what is known of it (rank 0).

        With staleness the engines need not hold them before the next batch is trained, so the learner goes on and
        only waits for the publication before this one.
        """
        weights = _plain(self._policy.weights())
        probe = self._probe()
        if not self._first:
            return None
        snapshot = self._snapshot(weights)
        attempt, update = self._progress.attempt, self._progress.update
        earlier = self._publication
        self._publication = self._job.conductor.publish.remote(attempt, update, snapshot, probe)
        if earlier is None:
            first: Any = ray.get(self._publication)
            ray.get(self._job.conductor.start_leasing.remote())
            return first
        return ray.get(self._publication if self._settings.max_staleness == 0 else earlier)

    def _snapshot(self, weights: dict[str, Tensor]) -> Snapshot:
        dtype = getattr(torch, self._job.rollout_dtype)
        return pack(weights, (self._progress.attempt, self._progress.update), dtype)

    @torch.no_grad()
    def _probe(self) -> Probe:
        """A fixed sequence of ordinary tokens, scored by the learner (every rank takes part)."""
        size = len(self._tokenizer)
        special = set(self._tokenizer.all_special_ids)
        ordinary = [token for token in range(size) if token not in special]
        count = min(16, self._max_probe())
        tokens = [ordinary[(7 + 31 * place) % len(ordinary)] for place in range(count)]
        batch = sequence_batch([tokens[:1]], [tokens[1:]]).to(device())
        logprobs, _ = causal_logprobs(self._policy, batch.tokens, batch.attention_mask)
        return Probe(tokens, logprobs[0].float().cpu().tolist(), self._bound)

    def _max_probe(self) -> int:
        """The engine's context must hold the probe and one more token; the shortest possible is a response's room."""
        return max(2, self._job.sampling.max_response_tokens)

    # held-out prompts ------------------------------------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        weights = {name: tensor.clone() for name, tensor in self._average.weights.items()}
        snapshot = self._snapshot(_plain(weights))
        answer = self._job.conductor.evaluate.remote(snapshot, self._job.held_out, self._job.sampling)
        self._evaluations.append(_Evaluation(self._progress.update, answer, weights))

    def _collect_evaluations(self, wait: bool) -> None:
        """Write down the evaluations that are done; keep the EMA policy with the best penalised held-out reward."""
        waiting = []
        for evaluation in self._evaluations:
            done, _ = ray.wait([evaluation.answer], timeout=None if wait else 0)
            if not done:
                waiting.append(evaluation)
                continue
            found: Any = ray.get(evaluation.answer)
            line = {"update": evaluation.update, "episodes": evaluation.update * self._settings.batch_size, **found}
            with (self._job.directory / "evaluations.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            objective = found["reward"] - self._settings.kl_coefficient * found["kl"]
            if not self._progress.best or objective > self._progress.best["objective"]:
                self._progress.best = {"update": evaluation.update, "objective": objective}
                self._export_policy("best", evaluation.weights)
        self._evaluations = waiting

    # state -----------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = load_newest(self._checkpoints)
        if checkpoint is not None and checkpoint.data["identity"] == self._job.identity:
            self._restore(checkpoint)
            return
        if self._first:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
            (self._job.directory / "evaluations.jsonl").unlink(missing_ok=True)
            shutil.rmtree(self._job.directory / "episodes", ignore_errors=True)

    def _restore(self, checkpoint: Checkpoint) -> None:
        data, tensors = checkpoint.data, checkpoint.tensors
        for name, engine in (("policy", self._policy), ("value", self._value)):
            parts = {moment: tensors[f"{name}-{moment}"] for moment in ("weights", *MOMENTS)}
            engine.load_state({**parts, "steps": data["steps"][name]})
        self._average.weights = dict(tensors["ema"])
        self._progress.attempt = data["attempt"] + 1
        self._progress.update = checkpoint.step
        self._progress.kl_coefficient = data["kl_coefficient"]
        self._progress.best = data["best"]
        if self._first:
            episodes = checkpoint.tables["episodes"].cast(EPISODE)
            ray.get(self._job.stream.restore.remote(data["ledger"], episodes, self._progress.attempt))
            _drop_after(self._job.directory / "evaluations.jsonl", checkpoint.step)

    def _save(self) -> None:
        self._collect_evaluations(wait=True)
        states = {"policy": self._policy.state(), "value": self._value.state()}
        if self._first:
            ledger, episodes = ray.get(self._job.stream.state.remote())
            tensors = {
                f"{name}-{part}": state[part] for name, state in states.items() for part in ("weights", *MOMENTS)
            }
            progress = self._progress
            data = {
                "identity": self._job.identity,
                "attempt": progress.attempt,
                "steps": {name: state["steps"] for name, state in states.items()},
                "kl_coefficient": progress.kl_coefficient,
                "best": progress.best,
                "ledger": ledger,
            }
            tables = {"episodes": episodes}
            write_checkpoint(
                self._checkpoints, progress.update, {**tensors, "ema": self._average.weights}, data, tables
            )
        sum_over_ranks(0.0)

    def _export(self) -> None:
        self._export_policy("policy", self._policy.weights())
        self._export_policy("ema", self._average.weights)
        with whole_directory(self._job.directory / "value") as directory:
            _value_model(self._job).save_value_model(directory, self._tokenizer, self._value.weights())

    def _export_policy(self, name: str, weights: dict[str, Tensor]) -> None:
        model: Any = self._policy.module
        with whole_directory(self._job.directory / name) as directory:
            export_causal_lm(
                directory,
                model.config,
                _plain(weights),
                self._tokenizer,
                self._job.sampling.max_response_tokens,
                temperature=self._job.sampling.temperature,
            )


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that Hugging Face and vLLM know."""
    prefix = PolicyModel.parameter_prefix
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _default_bound(learner_dtype: str, rollout_dtype: str) -> float:
    return 1e-3 if learner_dtype == rollout_dtype == "float32" else 1.0


def _straggler_age(table: pa.Table) -> float:
    """Seconds from lease to acceptance of the slowest episode of a batch."""
    times = table.select(["leased_at", "accepted_at"]).to_pylist()
    return max(row["accepted_at"] - row["leased_at"] for row in times)


def _drop_after(path: Path, update: int) -> None:
    """Take lines of updates after `update`, which a lost attempt wrote, out of evaluations.jsonl."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["update"] <= update]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)
