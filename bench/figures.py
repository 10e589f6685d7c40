"""What a measured run comes to: metrics of its updates in, figures out. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]
"""One line of metrics.jsonl."""

GIB = 1 << 30
PASSES = 10
"""Of 2·N FLOP a token: generate, reference, reward model, value; and 3 each (forward, and twice that backward) to
update policy and value. Recomputation and padding are not useful work."""
PASSES_OF_PRETRAINING = 3


@dataclass(frozen=True)
class Work:
    """What an update works on: parameters of each network, episodes, prompt tokens of each, pretraining tokens of
    each (0 without the pretraining term)."""

    parameters: int
    episodes: int
    prompt_tokens: int
    pretraining_tokens: int


@dataclass(frozen=True)
class Figures:
    """One workload, measured. Shares are of wall-clock time; an idle learner waits for episodes or a publication."""

    updates: int
    episodes_per_s: float
    response_tokens_mean: float
    generator_tokens_per_s: float
    scoring_tokens_per_s: float
    learner_tokens_per_s: float
    pretraining_tokens_per_s: float
    generator_tokens_per_busy_s: float
    publish_s: float
    pause_s: float
    learner_idle: float
    learner_waits_for_episodes: float
    generator_idle: float
    scoring_idle: float
    generator_cores: float
    scoring_cores: float
    learner_gib: float
    generator_gib: float
    scoring_gib: float
    first_update_s: float
    mismatch_nats: float
    gflops: float
    gflops_with_pretraining: float


def measured(lines: Sequence[Line], work: Work, warm_up: int, started_at: float) -> Figures:
    """The figures of the updates after the first `warm_up`, but for the last one, with which the run winds up.

    `lines` are those of metrics.jsonl, oldest first; `started_at` is the Unix time of the command. Raises ValueError
    where fewer than two updates would be left.
    """
    kept = lines[warm_up:-1]
    if len(kept) < 2 or warm_up < 2:  # with staleness the second line still has no shares of time
        raise ValueError(f"{len(lines)} updates, {warm_up} of them warm-up, are too few to measure")
    seconds = kept[-1]["time"] - lines[warm_up - 1]["time"]
    updates = len(kept)

    def mean(name: str) -> float:
        return sum(line[name] for line in kept) / updates

    def highest(name: str) -> float:
        return max((line[name] for line in lines if name in line), default=float("nan"))

    episodes_per_s = updates * work.episodes / seconds
    length = mean("response/length_mean")
    flop = 2.0 * work.parameters * (work.prompt_tokens + length)
    flop_of_pretraining = 2.0 * work.parameters * work.pretraining_tokens * PASSES_OF_PRETRAINING
    waiting = sum(line["time/wait_for_episodes"] for line in kept) / seconds
    # The publication's own part of time/publish: the rest of it is the learner copying and packing its weights.
    waits_for_publication = sum(min(line["sync/publish_seconds"], line["time/publish"]) for line in kept) / seconds
    generated = mean("generators/tokens_per_second")
    return Figures(
        updates=updates,
        episodes_per_s=episodes_per_s,
        response_tokens_mean=length,
        generator_tokens_per_s=episodes_per_s * length,
        scoring_tokens_per_s=mean("scoring/tokens_per_second"),
        learner_tokens_per_s=episodes_per_s * (work.prompt_tokens + length),
        pretraining_tokens_per_s=episodes_per_s * work.pretraining_tokens,
        generator_tokens_per_busy_s=generated / max(mean("generators/busy_share"), 1e-9),
        publish_s=mean("sync/publish_seconds"),
        pause_s=mean("sync/pause_seconds"),
        learner_idle=waiting + waits_for_publication,
        learner_waits_for_episodes=waiting,
        generator_idle=1.0 - mean("generators/busy_share"),
        scoring_idle=1.0 - mean("scoring/busy_share"),
        generator_cores=mean("generators/cores"),
        scoring_cores=mean("scoring/cores"),
        learner_gib=highest("memory/learner_bytes") / GIB,
        generator_gib=highest("memory/generators_bytes") / GIB,
        scoring_gib=highest("memory/scoring_bytes") / GIB,
        first_update_s=lines[0]["time"] - started_at,
        mismatch_nats=highest("mismatch/max_abs_log_ratio"),
        gflops=episodes_per_s * PASSES * flop / 1e9,
        gflops_with_pretraining=episodes_per_s * (PASSES * flop + flop_of_pretraining) / 1e9,
    )


def useful_fraction(figures: Figures, ceiling_flops: float) -> float:
    """The share of the machine's ceiling that was useful work on episodes (that on pretraining text not counted)."""
    return figures.gflops * 1e9 / ceiling_flops


def gflops(billions: float) -> str:
    """As it is printed: whole numbers, but for a machine that is very slow at it."""
    return f"{billions:.0f} GFLOP/s" if billions >= 10 else f"{billions:.2f} GFLOP/s"


def rows(figures: Figures, ceiling_flops: Mapping[str, float], ptx: bool) -> list[tuple[str, str]]:
    """What is printed: names and values. `ceiling_flops` is by dtype."""
    f = figures
    share = ", ".join(
        f"{useful_fraction(f, ceiling):.3f} of {gflops(ceiling / 1e9)} {dtype}"
        for dtype, ceiling in ceiling_flops.items()
    )
    told = [
        ("episodes/s", f"{f.episodes_per_s:.2f}"),
        ("useful work", f"{share} ({f.gflops:.1f} GFLOP/s)"),
        ("response tokens, mean", f"{f.response_tokens_mean:.1f}"),
        ("tokens/s generated", f"{f.generator_tokens_per_s:.0f} ({f.generator_tokens_per_busy_s:.0f} while at work)"),
        ("tokens/s scored", f"{f.scoring_tokens_per_s:.0f} (reward model and reference, prompts included)"),
        ("tokens/s learned", f"{f.learner_tokens_per_s:.0f} (prompts included)"),
        ("publication", f"{f.publish_s:.3f} s, generator's pause {f.pause_s:.3f} s"),
        ("learner idle", f"{f.learner_idle:.0%} (waiting for episodes {f.learner_waits_for_episodes:.0%})"),
        ("generator idle", f"{f.generator_idle:.0%} (cores used {f.generator_cores:.2f})"),
        ("scoring idle", f"{f.scoring_idle:.0%} (cores used {f.scoring_cores:.2f})"),
        (
            "peak memory, GiB",
            f"learner {f.learner_gib:.2f}, generator {f.generator_gib:.2f}, scoring {f.scoring_gib:.2f}",
        ),
        ("engine against learner", f"at most {f.mismatch_nats:.2g} nats a token"),
        ("first update after", f"{f.first_update_s:.1f} s"),
        ("updates measured", str(f.updates)),
    ]
    if ptx:
        shares = ", ".join(
            f"{f.gflops_with_pretraining * 1e9 / ceiling:.3f} {dtype}" for dtype, ceiling in ceiling_flops.items()
        )
        told.insert(2, ("with pretraining text", f"{shares} ({f.pretraining_tokens_per_s:.0f} tokens/s of it)"))
    return told
