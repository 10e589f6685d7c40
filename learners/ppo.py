"""The PPO learner: take a batch, value it, update, publish, checkpoint; and again."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from torch import Tensor

from actors.telemetry import Telemetry
from corpus.problems import RunProblem
from corpus.schemas import read_table
from learners.agreed_wait import wait_together
from learners.answers import Answers, has_come
from learners.ema import WeightAverage
from learners.engine import Engine
from learners.exported_figures import ExportedFigures
from learners.metrics import MetricsLog
from learners.ppo_batch import RewardRules, episode_batch, reward_batch
from learners.ppo_held_out import HeldOutEvaluations
from learners.ppo_job import PpoJob
from learners.ppo_mismatch import default_bound, mismatch, refuse_beyond, refuse_straggler
from learners.ppo_networks import export_policy, export_value, load_policy, load_value
from learners.ppo_publication import ARRIVAL, Publisher, made_up_sequence
from learners.ppo_recovery import Progress, RecoveryUnit
from learners.ppo_update import PpoUpdate, PretrainingOrder
from learners.process_group import any_rank, problem_of_ranks, process_group, sum_over_ranks
from learners.rows import documents
from learners.supervised import peak_memory_bytes
from learners.tracking import WandbRun
from learners.worker import Interrupted, Reporter, Worker
from models.build import context_length, load_tokenizer
from models.forward import PolicyModel
from objectives.kl import AdaptiveKL, FixedKL

log = logging.getLogger(__name__)


def train_ppo(job: PpoJob, worker: Worker) -> dict[str, Any]:
    """Trains all updates and exports policy, ema, value and best below `job.directory`.

    Results are the same on every rank but for times and memory, its own, and `best`, which rank 0 alone knows.

    Raises Interrupted, after a checkpoint, where asked to stop; RunProblem, after a checkpoint too, where engine and
    learner disagree or are too far apart, a batch, an episode or a publication is late, or held-out prompts are not
    answered; and RunProblem where a loss is not finite: in the midst of an update there is nothing whole to save, so
    that the last checkpoint counts.
    """
    with process_group():
        policy = Engine(PolicyModel(load_policy(job.policy)), job.engine, job.settings.policy, job.seed)
        value = Engine(load_value(job.reward_model), job.engine, job.settings.value, job.seed + 1)
        for engine in (policy, value):
            engine.module.train()  # else activations are not recomputed; every dropout is 0
        try:
            return _PpoLoop(job, worker, policy, value).run()
        finally:
            policy.close()
            value.close()


class _PpoLoop:
    def __init__(self, job: PpoJob, worker: Worker, policy: Engine, value: Engine) -> None:
        settings = job.settings
        self._job, self._worker, self._settings = job, worker, settings
        self._policy, self._value = policy, value
        self._tokenizer = load_tokenizer(job.tokenizer)
        self._reporter = Reporter(worker, "ppo", settings.updates, "updates")
        self._first = worker.rank == 0
        pretraining = _pretraining(job, policy.module) if settings.ptx_coefficient > 0 else None
        budget = job.engine.tokens_per_microbatch
        self._update = PpoUpdate(policy, value, settings, job.sampling.temperature, budget, job.seed, pretraining)
        self._rules = RewardRules(**{name: getattr(settings, name) for name in RewardRules.__dataclass_fields__})
        self._progress = Progress(kl_coefficient=settings.kl_coefficient)
        self._average = WeightAverage(policy.weights(), settings.ema_decay)
        self._answers = Answers(job.answer_deadline_s)
        dtypes = job.engine.dtype, job.rollout_dtype
        self._bound = settings.mismatch_bound_nats or default_bound(*dtypes)
        # Log-probs that are recomputed are compared over the batch, and what older weights wrote is not on-policy.
        of_minibatch = settings.old_logprobs == "behaviour" and settings.max_staleness == 0
        self._batch_bound = settings.mismatch_bound_nats or default_bound(*dtypes, first_minibatch=of_minibatch)
        made_up = made_up_sequence(self._tokenizer, job.sampling.max_response_tokens)
        self._publisher = Publisher(
            policy,
            job.conductor,
            self._answers,
            settings.max_staleness,
            job.rollout_dtype,
            self._bound,
            made_up,
            job.rollout_transport,
        )
        self._held_out = HeldOutEvaluations(
            job.conductor,
            self._answers,
            job.held_out,
            job.sampling,
            job.rollout_dtype,
            settings,
            job.directory,
            self._export_policy,
            worker.check_lease,
            self._show_evaluation,
        )
        self._unit = RecoveryUnit(
            job, worker, policy, value, self._average, self._held_out, self._answers, self._progress
        )
        self._metrics: MetricsLog | None = None

    # the whole -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        settings, progress = self._settings, self._progress
        self._unit.resume()
        if self._first:
            tracked = self._job.tracked
            tracker = WandbRun(tracked, "ppo", self._job.directory) if tracked is not None else None
            exported = ExportedFigures(
                Telemetry(self._worker.run, "learner", "rank-0"),
                "ppo",
                settings.updates,
                settings.kl_target_nats if settings.kl_controller == "adaptive" else None,
                settings.kl_budget_nats,
            )
            self._metrics = MetricsLog(self._job.directory, progress.update or None, exported, tracker)
        self._reporter.report(progress.update, now=True)
        started, episodes_before = time.monotonic(), progress.update
        try:
            while progress.update < settings.updates and not progress.stopped_by:
                began = time.monotonic()
                figures = self._publish()
                publishing = time.monotonic() - began
                figures |= self._one_update()
                progress.update += 1
                figures["time/publish"] = publishing
                figures["time/update"] = time.monotonic() - began
                figures["throughput/episodes_per_second"] = settings.batch_size / figures["time/update"]
                if self._unit.checkpoint_s is not None:
                    figures["time/checkpoint"] = self._unit.checkpoint_s
                with self._saving_what_is_trained(figures):
                    figures |= self._publisher.figures()
                if self._first:  # before the checkpoint: a run that goes on from it has every line
                    figures |= self._answers.of(self._job.stream.counts.remote(), "the stream's counts")
                    self._log(figures)
                last = progress.update == settings.updates or bool(progress.stopped_by)
                if self._first and not last and progress.update % settings.evaluate_every == 0:
                    self._held_out.begin(self._progress.version, self._average.weights)
                stop = self._worker.agreed_to_stop()
                due = last or stop or progress.update % settings.checkpoint_every == 0
                if due and not stop:  # a checkpoint is to know its evaluations, but a stop does not wait for them
                    stop = not self._evaluations_have_come()
                with self._saving_what_is_trained():
                    self._held_out.collect(wait=False)
                if due:
                    self._unit.save()
                if stop and not last:
                    raise self._interrupted()
                self._reporter.report(progress.update, figures, now=True)
            seconds = time.monotonic() - started
            self._published()
            with self._saving_what_is_trained():  # for what it does on every rank: there is a checkpoint already
                if self._first and not self._held_out.is_known(progress.update):
                    self._held_out.begin(self._progress.version, self._average.weights)
            if not self._evaluations_have_come():
                raise self._interrupted()  # all is saved but what this evaluation finds: it is begun again
            with self._saving_what_is_trained():
                self._held_out.collect(wait=True)
        finally:
            if self._metrics is not None:
                self._metrics.close()
        self._export()
        if self._first:
            self._answers.of(self._job.conductor.finish.remote(), "the generators to finish what they have in hand")
        sum_over_ranks(0.0)  # nobody reports success before rank 0 has written the exports
        return {
            "updates": progress.update,
            "episodes": progress.update * settings.batch_size,
            "attempt": progress.attempt,
            "best": self._held_out.best.found,
            "stopped_by": progress.stopped_by,
            "kl_coefficient": progress.kl_coefficient,
            "seconds": seconds,
            "episodes_per_second": (progress.update - episodes_before) * settings.batch_size / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _log(self, figures: Mapping[str, float]) -> None:
        """Writes the line of metrics of the last update, which is on the disk before a checkpoint is that holds it."""
        if self._metrics is not None:
            self._worker.check_lease()
            self._metrics.log(self._progress.update, figures)
            self._metrics.sync()

    def _show_evaluation(self, update: int, figures: Mapping[str, float | None]) -> None:
        if self._metrics is not None:
            self._metrics.evaluated(update, figures)

    def _one_update(self) -> dict[str, float]:
        """Nine phases: take, value, old log-probs, mismatch, rewards, update, commit, KL controller, figures."""
        settings, progress = self._settings, self._progress
        mark = time.monotonic()
        table = self._take(progress.update)
        waited, mark = time.monotonic() - mark, time.monotonic()
        batch, straggler_s = episode_batch(table, progress.update), _straggler_age(table)
        old_values = self._update.values(batch)
        old_logprobs = self._update.logprobs(batch) if settings.old_logprobs == "recomputed" else None
        apart = mismatch(self._update, batch, progress.update, old_logprobs, self._job.kv_kept)
        with self._saving_what_is_trained():
            refuse_beyond(self._batch_bound, settings.min_effective_sample_size, apart, progress.update)
            refuse_straggler(settings.straggler_bound_s, straggler_s, progress.update)
        self._publisher.probe_with(table)
        old_logprobs = batch.behaviour_logprobs if old_logprobs is None else old_logprobs
        rewards = reward_batch(batch, old_logprobs, old_values, self._rules.with_coefficient(progress.kl_coefficient))
        prepared, mark = time.monotonic() - mark, time.monotonic()
        trained = self._update.run(batch, rewards, old_logprobs, old_values, progress.update, self._after_step)
        if settings.ema_every == "update":
            self._average.update(self._policy.weights())
        if self._first:
            recorded = self._job.stream.trained.remote(progress.update, progress.attempt)
            self._answers.of(recorded, "the stream to record a trained batch")
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
            **apart,
            "policy/entropy_avg": rewards.figures["objective/entropy"] / rewards.figures["response/length_mean"],
            "time/wait_for_episodes": waited,
            "time/prepare": prepared,
            "time/train": time.monotonic() - mark,
            "throughput/tokens_per_second": tokens / (time.monotonic() - mark + prepared),
            "memory/learner_bytes": float(peak_memory_bytes()),
            "staleness/straggler_age_seconds": straggler_s,
        }

    @contextmanager
    def _saving_what_is_trained(self, unlogged: Mapping[str, float] | None = None) -> Iterator[None]:
        """A problem met between two updates, where the state is whole, is raised after a checkpoint, on every rank.
        `unlogged` are figures of the last update where it has no line of metrics yet: they are its line then.

        The block holds no collective but `wait_together`, which fails on every rank alike: a rank that fails in it
        would leave the others alone there.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below
            problem = error
        if not any_rank(problem is not None):
            return
        if unlogged is not None:
            try:
                self._log(unlogged)
            except Exception as second:  # noqa: BLE001 - what was trained counts for more than its line
                log.warning("update %d has no line of metrics: %s", self._progress.update, second)
        try:
            self._unit.save()
        except Exception as second:  # noqa: BLE001 - the first problem is what a person must hear of
            log.warning("no checkpoint could be written at update %d: %s", self._progress.update, second)
        raise problem_of_ranks(problem)

    # phases --------------------------------------------------------------------------------------------------------

    def _publish(self) -> dict[str, float]:
        """Bring the present weights into the engines; returns the figures of a publication that came to its end. Raises
        Interrupted, after a checkpoint, where rank 0 is asked to stop while one is waited for: what is saved is what
        the last update has left, and whoever goes on from it publishes it again."""
        weights, probe = self._publisher.prepare()
        figures = self._published()  # the one before this
        with self._saving_what_is_trained():
            if self._first:
                self._publisher.begin(self._progress.version, weights, probe)
        if self._publisher.is_awaited:
            figures = self._published()
        with self._saving_what_is_trained():
            self._publisher.let_lease(self._first)
        return figures

    def _published(self) -> dict[str, float]:
        """The figures of the publication under way, once it has come to its end; a stop is heeded meanwhile."""
        if not self._wait(
            lambda within_s: not self._first or self._publisher.has_come(within_s),
            self._answers.patience_s,
            lambda: self._answers.late(ARRIVAL),
        ):
            self._unit.save()
            raise self._interrupted()
        with self._saving_what_is_trained():
            return self._publisher.figures()

    def _take(self, batch: int) -> pa.Table:
        """Batch `batch` from the stream. While it is waited for nothing is under way in the networks, so that a stop is
        heeded at once: raises Interrupted, after a checkpoint, where any rank is asked for one."""
        deadline_s = self._settings.batch_deadline_s
        answer = self._job.stream.take.remote(batch, deadline_s, self._progress.attempt)
        patience_s = deadline_s + self._job.answer_deadline_s  # the stream itself tells who owes what, earlier
        told = f"ppo: the episode stream has said nothing of batch {batch} for {patience_s:.0f} s."
        if not self._wait(
            lambda within_s: has_come(answer, within_s), patience_s, lambda: RunProblem(told, "episodes/deadline")
        ):
            self._unit.save()
            raise self._interrupted()
        with self._saving_what_is_trained():
            return self._answers.of(answer, f"batch {batch}")

    def _evaluations_have_come(self) -> bool:
        """Waits for the held-out evaluations that are under way; False where a stop is asked for before they end."""
        return self._wait(
            lambda within_s: not self._first or self._held_out.have_come(within_s),
            self._answers.patience_s,
            lambda: self._answers.late("the conductor to have the held-out prompts answered"),
        )

    def _wait(self, come: Callable[[float], bool], patience_s: float, late: Callable[[], RunProblem]) -> bool:
        """As `wait_together`, between two updates: the progress stays alive, and a problem is raised after a
        checkpoint."""
        with self._saving_what_is_trained():
            return wait_together(
                come, self._worker.should_stop, lambda: self._reporter.report(self._progress.update), patience_s, late
            )

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"ppo, update {self._progress.update} of {self._settings.updates}")

    def _after_step(self) -> None:
        if self._settings.ema_every == "step":
            self._average.update(self._policy.weights())

    def _controller(self) -> FixedKL | AdaptiveKL:
        coefficient = self._progress.kl_coefficient
        if self._settings.kl_controller == "fixed":
            return FixedKL(coefficient)
        return AdaptiveKL(coefficient, self._settings.kl_target_nats, self._settings.kl_horizon_episodes)

    # exports -------------------------------------------------------------------------------------------------------

    def _export(self) -> None:
        """Exports; every rank takes part, because sharded weights are gathered. `best` appears last."""
        policy, value = self._policy.weights(), self._value.weights()
        if not self._first:
            return
        self._unit.leave_record()
        self._worker.check_lease()
        self._export_policy("policy", policy)
        self._export_policy("ema", self._average.weights)
        export_value(self._job.directory / "value", self._job.reward_model, value, self._tokenizer)
        self._held_out.best.promote()

    def _export_policy(self, name: str, weights: dict[str, Tensor]) -> None:
        config: Any = self._policy.module.config
        export_policy(self._job.directory / name, config, weights, self._tokenizer, self._job.sampling)


def _pretraining(job: PpoJob, policy: Any) -> PretrainingOrder:
    texts = documents(read_table(str(job.pretraining), "pretraining"))
    limit = context_length(policy.config) or job.settings.ptx_context
    return PretrainingOrder(texts, job.seed, min(limit, job.settings.ptx_context))


def _straggler_age(table: pa.Table) -> float:
    """Seconds from lease to acceptance of the slowest episode of a batch."""
    times = table.select(["leased_at", "accepted_at"]).to_pylist()
    return max(row["accepted_at"] - row["leased_at"] for row in times)
