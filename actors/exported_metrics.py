"""Every metric that a run exports to Prometheus, declared once. Pure: nothing here needs Ray.

Names follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): base units, `_total` for counters.
Ray puts `ray_` before them (`NAMESPACE` in ray/_private/telemetry/open_telemetry_metric_recorder.py) and labels of its
own beside ours. Docs, dashboard and alerts are held to these declarations by tests.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

PREFIX = "amenable_"
RAY_PREFIX = "ray_"

TAGS = ("run", "role", "worker")
"""On every metric: the run, the role that the number is about, and who of it; `worker` is empty for the whole role."""


class Kind(StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric: `tags` beside those that all have; for a histogram the upper bounds of its buckets.

    `figures` are names in a stage's metrics.jsonl whose value it takes, each with the tags that go with it. A gauge
    that does not last is gone a few seconds after it was set, unless it is set again.
    """

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    lasts: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """All tags of ours."""
        return (*TAGS, *self.tags)

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus reads it from a Ray node."""
        whole = RAY_PREFIX + self.name
        if self.kind is Kind.HISTOGRAM:
            return f"{whole}_bucket", f"{whole}_sum", f"{whole}_count"
        return (whole,)


def run_tag(run_directory: str) -> str:
    """The tag `run` of a run that is kept in this directory, or at this address in an object store: its last part."""
    place = run_directory.partition("?")[0] if "://" in run_directory else run_directory
    return place.rstrip("/").rpartition("/")[2]


_NAME = re.compile(PREFIX + r"[a-z]+(_[a-z]+)*")
_DECLARED: dict[str, Metric] = {}


def declare(metric: Metric, among: dict[str, Metric] | None = None) -> Metric:
    """Adds `metric` to those that may be exported (or to `among`), and returns it.

    Raises ValueError where its name is taken, or breaks a convention.
    """
    known = _DECLARED if among is None else among
    if metric.name in known:
        raise ValueError(f"{metric.name} is declared twice")
    if not _NAME.fullmatch(metric.name):
        raise ValueError(f"{metric.name} should be {PREFIX} and small letters, with one underscore between words")
    if metric.name.endswith("_total") != (metric.kind is Kind.COUNTER):
        raise ValueError(f"{metric.name} is a {metric.kind}: counters, and they alone, end with _total")
    if (metric.kind is Kind.HISTOGRAM) != bool(metric.buckets):
        raise ValueError(f"{metric.name} is a {metric.kind}: histograms, and they alone, have buckets")
    if not metric.description.isascii():
        raise ValueError(f"{metric.name}: Ray takes descriptions in ASCII alone")
    known[metric.name] = metric
    return metric


def declared() -> dict[str, Metric]:
    """All metrics that may be exported, by name, in the order of their declaration."""
    return dict(_DECLARED)


def metrics_of(figures: Mapping[str, float]) -> Iterator[tuple[Metric, Mapping[str, str], float]]:
    """What a line of metrics.jsonl comes to: metric, its tags, its value."""
    for metric in _DECLARED.values():
        for figure, tags in metric.figures.items():
            if figure in figures:
                yield metric, tags, figures[figure]


def _counter(name: str, description: str, tags: tuple[str, ...] = ()) -> Metric:
    return declare(Metric(PREFIX + name, Kind.COUNTER, description, tags))


def _gauge(
    name: str,
    description: str,
    tags: tuple[str, ...] = (),
    figures: Mapping[str, Mapping[str, str]] | None = None,
    lasts: bool = True,
) -> Metric:
    return declare(Metric(PREFIX + name, Kind.GAUGE, description, tags, figures or {}, lasts=lasts))


def _histogram(
    name: str,
    description: str,
    buckets: tuple[float, ...],
    tags: tuple[str, ...] = (),
    figures: Mapping[str, Mapping[str, str]] | None = None,
) -> Metric:
    return declare(Metric(PREFIX + name, Kind.HISTOGRAM, description, tags, figures or {}, buckets))


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# driver, and the actors of which a stage has one ---------------------------------------------------------------------

RUN_STAGE = _gauge("run_stage", "1 while the stage is under way, and absent once it is over.", ("stage",))
PROCESS_MEMORY = _gauge(
    "process_memory_bytes",
    "Memory of the process, resident on its machine: of driver, conductor, stream and weight store.",
)

# learner --------------------------------------------------------------------------------------------------------------

_STAGE = ("stage",)

LEARNER_STEP = _gauge(
    "learner_step", "Optimiser steps of the stage so far, in PPO updates; absent once the learners are through.", _STAGE
)
LEARNER_STEPS_WANTED = _gauge("learner_steps_wanted", "Steps that the stage has in all.", _STAGE)
LEARNER_STEP_TIMESTAMP = _gauge(
    "learner_step_timestamp_seconds", "Unix time of the last step, at first of the stage's beginning.", _STAGE
)
LEARNER_UPDATE_SECONDS = _histogram(
    "learner_update_seconds", "A PPO update, its publication included.", _SECONDS, _STAGE, {"time/update": {}}
)
LEARNER_PHASE_SECONDS = _gauge(
    "learner_phase_seconds",
    "What the last PPO update spent its time on.",
    (*_STAGE, "phase"),
    {
        "time/publish": {"phase": "publish"},
        "time/wait_for_episodes": {"phase": "wait"},
        "time/prepare": {"phase": "prepare"},
        "time/train": {"phase": "train"},
    },
)
LEARNER_TOKENS_PER_SECOND = _gauge(
    "learner_tokens_per_second",
    "Tokens trained a second, in the last step.",
    _STAGE,
    {"tokens_per_s": {}, "throughput/tokens_per_second": {}},
)
LEARNER_MEMORY = _gauge(
    "learner_memory_bytes",
    "Most memory of the learner's process so far, on its GPU where it has one.",
    _STAGE,
    {"peak_memory_bytes": {}, "memory/learner_bytes": {}},
)
LEARNER_LOSS = _gauge(
    "learner_loss",
    "Loss of the last step; in PPO by part: policy, value, and ptx before its factor.",
    (*_STAGE, "part"),
    {
        "loss": {"part": "whole"},
        "valid/loss": {"part": "validation"},
        "loss/policy_avg": {"part": "policy"},
        "loss/value_avg": {"part": "value"},
        "loss/ptx": {"part": "ptx"},
    },
)
LEARNER_GRADIENT_NORM = _gauge(
    "learner_gradient_norm",
    "Norm of the whole gradient before clipping.",
    (*_STAGE, "network"),
    {
        "grad_norm": {"network": "model"},
        "policy/gradient_norm": {"network": "policy"},
        "val/gradient_norm": {"network": "value"},
    },
)
LEARNER_LEARNING_RATE = _gauge(
    "learner_learning_rate",
    "Learning rate of the stage's model, in PPO of the policy, and of the value network.",
    (*_STAGE, "network"),
    {"lr": {"network": "model"}, "lr_value": {"network": "value"}},
)
LEARNER_KL = _gauge(
    "learner_kl_nats",
    "Mean log-ratio of policy to reference, summed over a response: nats a sequence.",
    _STAGE,
    {"objective/kl": {}},
)
LEARNER_KL_TARGET = _gauge("learner_kl_target_nats", "What an adaptive coefficient steers the KL to.", _STAGE)
LEARNER_KL_BUDGET = _gauge("learner_kl_budget_nats", "KL beyond which PPO stops, where the recipe says so.", _STAGE)
LEARNER_KL_COEFFICIENT = _gauge(
    "learner_kl_coefficient", "Factor on the KL penalty (beta).", _STAGE, {"objective/kl_coefficient": {}}
)
LEARNER_REWARD = _gauge(
    "learner_reward",
    "Means over the batch: the reward model's score, the KL penalty, and what PPO raises.",
    (*_STAGE, "part"),
    {
        "objective/scores": {"part": "score"},
        "objective/non_score_reward": {"part": "kl_penalty"},
        "objective/rlhf_reward": {"part": "whole"},
    },
)
LEARNER_ENTROPY = _gauge(
    "learner_entropy_nats", "Minus the log-probability of a sampled token.", _STAGE, {"policy/entropy_avg": {}}
)
LEARNER_APPROX_KL = _gauge(
    "learner_approx_kl_nats", "Of new to old policy, nats a token.", _STAGE, {"policy/approxkl_avg": {}}
)
LEARNER_CLIP_FRACTION = _gauge(
    "learner_clip_fraction",
    "Share of tokens where the clip was active.",
    (*_STAGE, "network"),
    {"policy/clipfrac_avg": {"network": "policy"}, "val/clipfrac_avg": {"network": "value"}},
)
LEARNER_EXPLAINED_VARIANCE = _gauge(
    "learner_explained_variance",
    "Of the value network: 1 is perfect, 0 no better than the mean return.",
    _STAGE,
    {"val/explained_variance": {}},
)
LEARNER_RESPONSE_TOKENS = _gauge(
    "learner_response_tokens", "Mean length of a batch's responses.", _STAGE, {"response/length_mean": {}}
)
LEARNER_TRUNCATED_FRACTION = _gauge(
    "learner_truncated_fraction",
    "Share of responses that were cut before end-of-text.",
    _STAGE,
    {"response/truncated_fraction": {}},
)
LEARNER_VERSION_LAG = _gauge(
    "learner_version_lag_updates",
    "Most updates by which weights that wrote a token of the batch were older.",
    _STAGE,
    {"staleness/version_lag_max": {}},
)
LEARNER_MISMATCH = _gauge(
    "learner_mismatch_nats",
    "Largest difference between engine and learner on one token, in the batch and in the probe.",
    (*_STAGE, "of"),
    {"mismatch/max_abs_log_ratio": {"of": "batch"}, "mismatch/probe_nats": {"of": "probe"}},
)
LEARNER_NON_FINITE = _counter(
    "learner_non_finite_figures_total", "Figures of a step that were infinite or not a number.", _STAGE
)

# stream ---------------------------------------------------------------------------------------------------------------

STREAM_SLOTS = _counter(
    "stream_slots_total",
    "What became of slots: leased, generated, regenerated, duplicates, refused, trained, discarded.",
    ("outcome",),
)
STREAM_WAITING = _gauge("stream_waiting_episodes", "Episodes that are accepted and not trained yet.")
STREAM_ADMITTED = _gauge("stream_admitted_slots", "Slots below this number may be generated.")
STREAM_ATTEMPT = _gauge("stream_attempt", "The present attempt of the stage.")
STREAM_AWAITED = _gauge(
    "stream_awaited_timestamp_seconds",
    "Unix time since which the learners wait for a batch that is not complete; 0 while they do not.",
)
STREAM_TRAINED = _gauge(
    "stream_trained_timestamp_seconds", "Unix time of the last trained batch, at first of the stream's beginning."
)

# generators and scoring processes ------------------------------------------------------------------------------------

WORKER_BUSY = _counter("worker_busy_seconds_total", "Seconds at work: engine steps, scoring calls.")
WORKER_TOKENS = _counter(
    "worker_tokens_total", "Tokens: of finished responses in generators, read ones, prompts included, in scoring."
)
# Set at every heartbeat, and there are none between two stages that ask for them.
WORKER_MEMORY = _gauge("worker_memory_bytes", "Memory of the process, resident on its machine.", lasts=False)
WORKER_STALLED = _gauge(
    "worker_stalled_seconds", "For how long what it is at has not got on; 0 while idle.", lasts=False
)
GENERATOR_PAUSE = _histogram(
    "generator_pause_seconds", "Generation stood still for new weights.", (0.01, 0.025, *_SECONDS)
)
SCORING_NON_FINITE = _counter("scoring_non_finite_rewards_total", "Rewards that were infinite or not a number.")

# conductor ------------------------------------------------------------------------------------------------------------

PUBLICATIONS = _counter("publications_total", "Publications of weights that came to their end.")
PUBLICATION_FAILURES = _counter("publication_failures_total", "Publications that failed, with which the run stops.")
PUBLICATION_LOSSES = _counter(
    "publication_losses_total",
    "Generators that did not take weights: late, dead, or in disagreement with the learner (refused).",
    ("reason",),
)
PUBLICATION_SECONDS = _histogram("publication_seconds", "From weights packed to slots admitted.", _SECONDS)
PUBLICATION_UPDATE = _gauge("publication_update", "The update whose weights were published last.")
PUBLICATION_BEGUN = _gauge(
    "publication_begun_timestamp_seconds", "Unix time at which the publication under way began; 0 without one."
)
FLEET_WORKERS = _gauge(
    "fleet_workers", "Workers of the role in each state of health; those that are healthy serve.", ("state",)
)
FLEET_WANTED = _gauge("fleet_wanted_workers", "Workers that the role should have.")
FLEET_LOSSES = _counter("fleet_losses_total", "Workers that died or were given up.")

# weight store ---------------------------------------------------------------------------------------------------------

STORE_SNAPSHOT = _gauge("weight_store_snapshot_bytes", "Size of the newest snapshot.")
STORE_UPDATE = _gauge("weight_store_update", "The update whose weights are the newest snapshot.")
STORE_WRITE_FAILURES = _counter(
    "weight_store_write_failures_total",
    "Snapshots that could not be written, to disk or to the object store.",
    ("place",),
)

# serving --------------------------------------------------------------------------------------------------------------

REQUESTS = _counter("requests_total", "Requests answered.", ("route", "model", "status"))
REQUEST_SECONDS_TAKEN = _histogram(
    "request_seconds", "From a request's head to the end of its response.", REQUEST_SECONDS, ("route", "model")
)
GENERATED_TOKENS = _counter("generated_tokens_total", "Tokens generated.", ("model",))
REQUESTS_IN_FLIGHT = _gauge("requests_in_flight", "Requests that generate or score, queued ones too.")
RESPONSES_QUEUED = _gauge("responses_queued", "Responses beyond those that the engines work on at once.")
SLOT = _gauge("slot", "1 for what each engine slot holds.", ("slot", "model", "version"))
WEIGHT_CHANGES = _counter("weight_changes_total", "Weights put into engines.", ("slot",))
STOOD_STILL = _counter("stood_still_seconds_total", "Generation stood still for weights.", ("slot",))
