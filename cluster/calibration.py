"""What a run measured, as constants of a plan: the medians of its PPO updates put in place of assumptions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.ppo_time import (
    Constants,
    PpoWork,
    generation_seconds,
    prepare_flop,
    train_flop,
    train_overhead_s,
    update_time,
)
from corpus.problems import UsageProblem

FEWEST_UPDATES = 3
"""The first update, which warms up, and two to take a median of."""

_SMALLEST_SHARE = 1e-9
"""Of a peak: where overheads alone explain a phase, its arithmetic is taken for free rather than negative."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Medians over a run's updates but the first: seconds by phase, and tokens; and its longest checkpoint."""

    updates: int
    publish_s: float
    wait_s: float
    prepare_s: float
    train_s: float
    update_s: float
    prompt_tokens: float
    response_tokens: float
    longest_response_tokens: float
    checkpoint_s: float | None = None
    """The longest checkpoint, seconds; None where none had been written before the last update."""


@dataclass(frozen=True)
class Calibration:
    """The constants that a run gives, and how well a plan would have told the run's own update, in shares of it.

    `error_before` is (planned − measured) / measured with the assumptions, `error_after` with the run's constants.
    """

    constants: Constants
    measured: Measured
    error_before: float
    error_after: float


def measured(lines: Sequence[Line], batch_size: int, max_response_tokens: int) -> Measured:
    """The medians in the lines of a PPO stage's metrics.jsonl. Raises UsageProblem where they are too few.

    The longest response of a batch is not recorded: it is put two and a half standard deviations above the mean, about
    where the largest of some hundred draws of a normal lies, and no longer than a response may be.
    """
    kept = [line for line in lines[1:] if line.get("time/update") is not None]
    if len(kept) < FEWEST_UPDATES - 1:
        raise UsageProblem(
            f"The run has {len(lines)} PPO updates in its metrics; a plan is calibrated by {FEWEST_UPDATES} or more.",
            "run/not-so-far",
        )

    def median(name: str) -> float:
        return statistics.median(line[name] for line in kept)

    response = median("response/length_mean")
    tokens = statistics.median(
        line["throughput/tokens_per_second"] * (line["time/train"] + line["time/prepare"]) for line in kept
    )
    return Measured(
        updates=len(lines),
        publish_s=median("time/publish"),
        wait_s=median("time/wait_for_episodes"),
        prepare_s=median("time/prepare"),
        train_s=median("time/train"),
        update_s=median("time/update"),
        prompt_tokens=max(tokens / batch_size - response, 0.0),
        response_tokens=response,
        longest_response_tokens=min(response + 2.5 * median("response/length_std"), float(max_response_tokens)),
        checkpoint_s=max((line["time/checkpoint"] for line in lines if line.get("time/checkpoint")), default=None),
    )


def calibrated(work: PpoWork, lines: Sequence[Line], assumed: Constants) -> Calibration:
    """`assumed` with what the run of `work` measured in its place. Raises UsageProblem as `measured`.

    Each phase gives one constant: training and preparing the shares of the peak, waiting for episodes the seconds of an
    engine step, publishing its overhead. Where responses are generated during the update (staleness), the wait says
    nothing of the engines, and what is assumed of them stays.
    """
    found = measured(lines, work.ppo.batch_size, work.sampling.max_response_tokens)
    lengths = replace(
        assumed,
        prompt_share=found.prompt_tokens / work.max_prompt_tokens,
        response_share=found.response_tokens / work.sampling.max_response_tokens,
        longest_share=found.longest_response_tokens / work.sampling.max_response_tokens,
    )
    peak = work.learners.workers * work.learners.devices * work.machines.learners.flops(work.learners.engine.dtype)
    overhead_s = min(train_overhead_s(work, lengths), 0.5 * found.train_s)
    steps = work.ppo.minibatches * work.ppo.inner_epochs
    constants = replace(
        lengths,
        train_share=_share(train_flop(work, lengths), found.train_s - overhead_s, peak),
        forward_share=_share(prepare_flop(work, lengths), found.prepare_s, peak),
    )
    copies_s = train_overhead_s(work, replace(constants, optimizer_step_s=0.0))
    constants = replace(constants, optimizer_step_s=max(overhead_s - copies_s, 0.0) / steps)
    free = update_time(work, replace(constants, publish_s=0.0, engine_step_s=0.0))
    constants = replace(constants, publish_s=max(found.publish_s - free.publish_s, 0.0))
    if work.ppo.max_staleness == 0:
        constants = replace(constants, engine_step_s=_engine_step_s(work, constants, found.wait_s))
    before = update_time(work, assumed).update_s
    after = update_time(work, constants).update_s
    return Calibration(constants, found, before / found.update_s - 1, after / found.update_s - 1)


def _share(flop: float, seconds: float, peak: float) -> float:
    return max(flop / (max(seconds, 1e-9) * peak), _SMALLEST_SHARE)


def _engine_step_s(work: PpoWork, constants: Constants, wait_s: float) -> float:
    """Seconds of overhead an engine step that make the plan's wait for a batch the measured one."""
    without = update_time(work, replace(constants, engine_step_s=0.0)).learner_waits_s
    at_rest, _ = generation_seconds(work, replace(constants, engine_step_s=0.0))
    with_one, _ = generation_seconds(work, replace(constants, engine_step_s=1.0))
    return max(wait_s - without, 0.0) / (with_one - at_rest)
