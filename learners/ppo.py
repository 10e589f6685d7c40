"""The PPO learner: take a batch, value it, update, publish, checkpoint; and again.

Stream and learner are one recovery unit: a checkpoint holds both, its manifest is the commit, and a restart returns
both to it under a new attempt.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
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
from learners.metrics import MetricsLog, read_metrics
from learners.ppo_batch import EpisodeBatch, RewardRules, episode_batch, reward_batch
from learners.ppo_settings import PpoSettings
from learners.ppo_update import PpoUpdate, PretrainingOrder
from learners.process_group import any_rank, device, process_group, sum_over_ranks
from learners.rows import documents
from learners.supervised import peak_memory_bytes
from learners.worker import Interrupted, Reporter, Worker
from models.build import context_length, load_causal_lm, load_tokenizer, set_residual_dropout
from models.export import export_causal_lm
from models.forward import PolicyModel, causal_logprobs
from models.scalar_head import load_scalar
from models.sequences import sequence_batch
from models.snapshot import Snapshot, pack
from objectives.kl import AdaptiveKL, FixedKL

PROBE_ROWS = 4
"""Episodes of the last batch that engine and learner both score after every publication."""

log = logging.getLogger(__name__)


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
    answer_deadline_s: float
    """Seconds until stream or conductor, who say nothing at all, are given up: above every deadline that they keep
    themselves, which tell more."""
    held_out: HeldOut


def train_ppo(job: PpoJob, worker: Worker) -> dict[str, Any]:
    """Trains all updates and exports policy, ema, value and best below `job.directory`; the same result on every rank.

    Raises Interrupted, after a checkpoint, where asked to stop; RunProblem, after a checkpoint too, where engine and
    learner disagree, a batch or a publication is late, or held-out prompts are not answered; and RunProblem where a
    loss is not finite: in the midst of an update there is nothing whole to save, so that the last checkpoint counts.
    """
    with process_group():
        policy = Engine(PolicyModel(_policy_model(job)), job.engine, job.settings.policy, job.seed)
        value = Engine(_value_model(job), job.engine, job.settings.value, job.seed + 1)
        for engine in (policy, value):
            engine.module.train()  # else activations are not recomputed; every dropout is 0
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
    evaluated: int = 0
    """Update of the last held-out evaluation that `best` has seen."""
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
            module: Any = policy.module
            limit = context_length(module.config) or job.settings.ptx_context
            pretraining = PretrainingOrder(texts, job.seed, min(limit, job.settings.ptx_context))
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
        self._evaluation_log = job.directory / "evaluations.jsonl"
        self._probe_sequences: list[list[int]] = []
        self._leasing = False
        self._publication: Any = None
        """A publication whose figures are not logged yet."""
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
                figures = self._publish()
                publishing = time.monotonic() - began
                figures |= self._one_update()
                progress.update += 1
                with self._saving_what_is_trained():
                    figures |= self._publication_figures(wait=False)
                figures["time/publish"] = publishing
                figures["time/update"] = time.monotonic() - began
                figures["throughput/episodes_per_second"] = settings.batch_size / figures["time/update"]
                if metrics is not None:  # before the checkpoint, so that a run that goes on from it has every line
                    figures |= self._ask(self._job.stream.counts.remote(), "the stream's counts")
                    metrics.log(progress.update, figures)
                last = progress.update == settings.updates or bool(progress.stopped_by)
                if self._first and not last and progress.update % settings.evaluate_every == 0:
                    self._begin_evaluation()
                stop = self._worker.agreed_to_stop()
                if last or stop or progress.update % settings.checkpoint_every == 0:
                    self._save()
                if stop and not last:
                    raise Interrupted(f"ppo, update {progress.update} of {settings.updates}")
                with self._saving_what_is_trained():
                    self._collect_evaluations(wait=False)
                self._reporter.report(progress.update, figures, now=True)
        finally:
            if metrics is not None:
                metrics.close()
        seconds = time.monotonic() - started
        self._publication_figures(wait=True)
        if self._first and progress.evaluated != progress.update:
            self._begin_evaluation()
        self._collect_evaluations(wait=True)
        self._export()
        if self._first:
            self._ask(self._job.conductor.finish.remote(), "the generators to finish what they have in hand")
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

    def _one_update(self) -> dict[str, float]:
        """Nine phases: take, value, old log-probs, mismatch, rewards, update, commit, KL controller, figures."""
        settings, progress = self._settings, self._progress
        mark = time.monotonic()
        with self._saving_what_is_trained():
            table = self._take(progress.update)
        waited, mark = time.monotonic() - mark, time.monotonic()
        batch = episode_batch(table, progress.attempt, progress.update)
        old_values = self._update.values(batch)
        old_logprobs = self._update.logprobs(batch) if settings.old_logprobs == "recomputed" else None
        mismatch = self._mismatch(batch, old_logprobs)
        with self._saving_what_is_trained():
            self._refuse_beyond_bound(mismatch)
        self._probe_sequences = _some_sequences(table)
        old_logprobs = batch.behaviour_logprobs if old_logprobs is None else old_logprobs
        rewards = reward_batch(batch, old_logprobs, old_values, self._rules.with_coefficient(progress.kl_coefficient))
        prepared, mark = time.monotonic() - mark, time.monotonic()
        trained = self._update.run(batch, rewards, old_logprobs, old_values, progress.update, self._after_step)
        if settings.ema_every == "update":
            self._average.update(self._policy.weights())
        if self._first:
            self._ask(self._job.stream.trained.remote(progress.update), "the stream to record a trained batch")
        kl_nats = rewards.figures["objective/kl"]
        if progress.update >= settings.critic_warmup_updates:  # before that β has nothing to steer
            progress.kl_coefficient = self._controller().updated(kl_nats, batch.rows).coefficient
        if settings.kl_budget_nats is not None and kl_nats > settings.kl_budget_nats:
            progress.stopped_by = f"the KL budget: {kl_nats:.2f} nats a sequence, over {settings.kl_budget_nats:g}"
        tokens = float(sum(batch.lengths))
        return {
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

    @contextmanager
    def _saving_what_is_trained(self) -> Iterator[None]:
        """A problem met between two updates, where the state is whole, is raised after a checkpoint, on every rank.

        The block holds no collective: a rank that fails in it would leave the others alone there.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below
            problem = error
        if not any_rank(problem is not None):
            return
        try:
            self._save(evaluations=False)
        except Exception as second:  # noqa: BLE001 - the first problem is what a person must hear of
            log.warning("no checkpoint could be written at update %d: %s", self._progress.update, second)
        raise problem or RunProblem("ppo: another rank could not go on.")

    # phases --------------------------------------------------------------------------------------------------------

    def _take(self, batch: int) -> pa.Table:
        """Batch `batch` from the stream; looks up every second so that progress stays alive."""
        patience_s = self._settings.batch_deadline_s
        answer = self._job.stream.take.remote(batch, patience_s)
        give_up = (
            time.monotonic() + patience_s + self._job.answer_deadline_s
        )  # the stream itself tells who owes what, earlier
        while True:
            done, _ = ray.wait([answer], timeout=1.0)
            if done:
                return ray.get(answer)
            if time.monotonic() > give_up:
                raise RunProblem(f"ppo: the episode stream has said nothing of batch {batch} for {patience_s:.0f} s.")
            self._reporter.report(self._progress.update)

    def _mismatch(self, batch: EpisodeBatch, recomputed: Tensor | None) -> dict[str, float]:
        """Engine against learner on tokens that the learner's present weights wrote, before its first step.

        Where the learner's log-probs are computed for this alone, the first minibatch's rows have to do. Nothing where
        older weights wrote every token (staleness): the probe after each publication then stands alone.
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
        return {
            "mismatch/max_abs_log_ratio": difference.max().item(),
            "mismatch/mean_abs_log_ratio": difference.mean().item(),
        }

    def _refuse_beyond_bound(self, mismatch: dict[str, float]) -> None:
        largest = mismatch.get("mismatch/max_abs_log_ratio", 0.0)
        if not largest <= self._bound:
            raise RunProblem(
                f"ppo: at update {self._progress.update + 1} engine and learner disagree on the log-probability of a "
                f"token by {largest:.4g} nats, beyond the bound of {self._bound:g}; their weights, temperature or "
                "dtype differ."
            )

    def _after_step(self) -> None:
        if self._settings.ema_every == "step":
            self._average.update(self._policy.weights())

    def _controller(self) -> FixedKL | AdaptiveKL:
        coefficient = self._progress.kl_coefficient
        if self._settings.kl_controller == "fixed":
            return FixedKL(coefficient)
        return AdaptiveKL(coefficient, self._settings.kl_target_nats, self._settings.kl_horizon_episodes)

    # publication ---------------------------------------------------------------------------------------------------

    def _publish(self) -> dict[str, float]:
        """Bring the present weights into the engines; returns the figures of a publication that came to its end.

        With staleness the engines need not hold them before the next batch is trained, so the learner goes on and
        only waits for the publication before this one, where that is still under way.
        """
        weights = _plain(self._policy.weights())
        probe = self._probe()
        figures: dict[str, float] = {}
        with self._saving_what_is_trained():
            if self._first:
                figures = self._publish_from_here(weights, probe)
        return figures

    def _publish_from_here(self, weights: dict[str, Tensor], probe: Probe) -> dict[str, float]:
        snapshot = self._snapshot(weights)
        attempt, update = self._progress.attempt, self._progress.update
        figures = self._publication_figures(wait=True)
        self._publication = self._job.conductor.publish.remote(attempt, update, snapshot, probe)
        if not self._leasing or self._settings.max_staleness == 0:
            figures = self._publication_figures(wait=True)
        if not self._leasing:
            self._ask(self._job.conductor.start_leasing.remote(), "the generators to begin to lease")
            self._leasing = True
        return figures

    def _publication_figures(self, wait: bool) -> dict[str, float]:
        """What is to be logged of the publication under way once it has come to its end, and nothing before or again.

        Every publication is logged once: on the line of its own update, unless it takes longer than the update.
        """
        if self._publication is None or not (wait or ray.wait([self._publication], timeout=0)[0]):
            return {}
        published: Publication = self._ask(self._publication, "new weights to be published")
        self._publication = None
        return {
            "sync/publish_seconds": published.seconds,
            "sync/pause_seconds": published.pause_s,
            "mismatch/probe_nats": published.probe_nats,
            "mismatch/probe_mean_nats": published.probe_mean_nats,
            **published.roles,
        }

    def _ask(self, answer: Any, what: str) -> Any:
        """What an actor answers. It has deadlines of its own, which name who owed it; this one is for its silence."""
        patience_s = self._job.answer_deadline_s * (1 + len(self._evaluations))  # which are sampled one after another
        done, _ = ray.wait([answer], timeout=patience_s)
        if not done:
            raise RunProblem(f"ppo: waited {patience_s:.0f} s for {what}.")
        return ray.get(answer)

    def _snapshot(self, weights: dict[str, Tensor]) -> Snapshot:
        dtype = getattr(torch, self._job.rollout_dtype)
        return pack(weights, (self._progress.attempt, self._progress.update), dtype)

    @torch.no_grad()
    def _probe(self) -> Probe:
        """Sequences scored by the learner (every rank takes part): some of the last batch, a made-up one before it."""
        sequences = self._probe_sequences or [self._made_up_sequence()]
        batch = sequence_batch([tokens[:1] for tokens in sequences], [tokens[1:] for tokens in sequences]).to(device())
        logprobs, _ = causal_logprobs(self._policy, batch.tokens, batch.attention_mask)
        scored = [
            row[: len(tokens) - 1] for row, tokens in zip(logprobs.float().cpu().tolist(), sequences, strict=True)
        ]
        return Probe(sequences, scored, self._bound)

    def _made_up_sequence(self) -> list[int]:
        """Ordinary tokens, fewer than a response may have: the engine's context must hold them and one more."""
        special = set(self._tokenizer.all_special_ids)
        ordinary = [token for token in range(len(self._tokenizer)) if token not in special]
        count = min(16, max(2, self._job.sampling.max_response_tokens))
        return [ordinary[(7 + 31 * place) % len(ordinary)] for place in range(count)]

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
            if not wait and not ray.wait([evaluation.answer], timeout=0)[0]:
                waiting.append(evaluation)
                continue
            found = self._ask(evaluation.answer, "the held-out prompts to be answered")
            self._worker.check_lease()
            line = {"update": evaluation.update, "episodes": evaluation.update * self._settings.batch_size, **found}
            with self._evaluation_log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            self._progress.evaluated = evaluation.update
            objective = found["reward"] - self._settings.kl_coefficient * found["kl"]
            if not self._progress.best or objective > self._progress.best["objective"]:
                self._progress.best = {"update": evaluation.update, "objective": objective}
                self._export_policy(_candidate(evaluation.update), evaluation.weights)
        self._evaluations = waiting

    def _forget_candidates(self, but: dict[str, float]) -> None:
        """Remove candidates for the best policy, but for the one that a checkpoint, or the end of the run, names."""
        kept = _candidate(int(but["update"])) if but else ""
        for path in self._job.directory.glob("best-*"):
            if path.name != kept:
                shutil.rmtree(path)

    # state -----------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = load_newest(self._checkpoints)
        if checkpoint is not None and checkpoint.data["identity"] == self._job.identity:
            self._restore(checkpoint)
            return
        dist.barrier()  # every rank has looked for one
        if self._first:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
            self._evaluation_log.unlink(missing_ok=True)
            shutil.rmtree(self._job.directory / "episodes", ignore_errors=True)
            self._forget_candidates({})

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
        self._progress.evaluated = data["evaluated"]
        self._progress.stopped_by = data["stopped_by"]
        if data["best"] and not any((self._job.directory / name).exists() for name in (_candidate_of(data), "best")):
            # An older checkpoint than the newest, whose candidate went with it: what comes is compared anew.
            self._progress.best, self._progress.evaluated = {}, min(data["evaluated"], checkpoint.step - 1)
        if self._first:
            episodes = checkpoint.tables["episodes"].cast(EPISODE)
            restored = self._job.stream.restore.remote(data["ledger"], episodes, self._progress.attempt)
            self._ask(restored, "the stream to go back to the checkpoint")
            _drop_after(self._evaluation_log, data["evaluated"])
            self._forget_candidates(data["best"])
            due = checkpoint.step % self._settings.evaluate_every == 0 and checkpoint.step < self._settings.updates
            if due and not data["stopped_by"] and self._progress.evaluated < checkpoint.step:
                self._begin_evaluation()  # it was under way when the run failed; the average is the same

    def _save(self, evaluations: bool = True) -> None:
        """A checkpoint of learner and stream; held-out evaluations under way are waited for, unless told otherwise."""
        if evaluations:
            with self._saving_what_is_trained():
                self._collect_evaluations(wait=True)
        states = {"policy": self._policy.state(), "value": self._value.state()}
        if self._first:
            ledger, episodes = self._ask(self._job.stream.state.remote(), "the stream's state")
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
                "evaluated": progress.evaluated,
                "stopped_by": progress.stopped_by,
                "ledger": ledger,
            }
            self._worker.check_lease()
            write_checkpoint(
                self._checkpoints,
                progress.update,
                {**tensors, "ema": self._average.weights},
                data,
                {"episodes": episodes},
            )
            self._forget_candidates(progress.best)
        sum_over_ranks(0.0)

    def _export(self) -> None:
        """Exports; every rank takes part, because sharded weights are gathered. `best` appears last."""
        policy, value = self._policy.weights(), self._value.weights()
        if not self._first:
            return
        self._worker.check_lease()
        self._export_policy("policy", policy)
        self._export_policy("ema", self._average.weights)
        with whole_directory(self._job.directory / "value") as directory:
            _value_model(self._job).save_value_model(directory, self._tokenizer, value)
        candidate, best = (
            self._job.directory / name for name in (_candidate(int(self._progress.best["update"])), "best")
        )
        if candidate.exists():  # else the run was interrupted after this very step
            shutil.rmtree(best, ignore_errors=True)
            candidate.rename(best)
        self._forget_candidates({})

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


def _candidate(update: int) -> str:
    return f"best-{update:06d}"


def _candidate_of(data: dict[str, Any]) -> str:
    return _candidate(int(data["best"]["update"]))


def _some_sequences(table: pa.Table) -> list[list[int]]:
    """The first PROBE_ROWS episodes of a batch: prompt and response, without the last token, so that one more fits."""
    prompts, responses = (table[name][:PROBE_ROWS].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    sequences = [[*prompt, *response][:-1] for prompt, response in zip(prompts, responses, strict=True)]
    return [tokens for tokens in sequences if len(tokens) > 1]


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
    lines = [line for line in read_metrics(path) if line["update"] <= update]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(path)
