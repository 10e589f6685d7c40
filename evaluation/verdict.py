"""Whether PPO learned anything, in words that claim no more than the intervals show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evaluation.schema import Accuracy, Comparison, Judge, Results
from evaluation.win_rate import WinRate

Mood = Literal["good", "mixed", "bad"]


@dataclass(frozen=True)
class Verdict:
    """What the comparison of `ppo` with `sft` shows."""

    learned: bool | None
    """True: it wins, raw and length-controlled, with both 95 % intervals above 50 %, by the gold judge. False: it does
    not, by the gold judge or, without one, by the reward model. None: there was no comparison, or the only judge in its
    favour is the reward model, which does not prove learning."""

    judge: Judge
    """Whose scores decide: the gold function where there is one."""

    headline: str
    """A few words."""

    sentence: str
    """The figures, with their intervals."""

    mood: Mood
    """How good the news is."""


def verdict(results: Results) -> Verdict:
    """Compares `ppo` with `sft`, by the gold judge where there is one."""
    judge: Judge = "gold" if any(found.judge == "gold" for found in results.comparisons) else "reward"
    against_sft = results.comparison("ppo", "sft", judge)
    if against_sft is None:
        sentence = "PPO's answers were not compared with the SFT baseline's."
        return Verdict(None, judge, "Not measured", sentence, "mixed")
    sentence = _sentence(against_sft, results.comparison("ppo", "ppo-init", judge))
    learned, headline, mood = _judgement(against_sft.raw, against_sft.length_controlled, judge)
    return Verdict(learned, judge, headline, sentence, mood)


def _judgement(raw: WinRate, controlled: WinRate, judge: Judge) -> tuple[bool | None, str, Mood]:
    """Whether it learned, the headline and the mood."""
    if raw.low > 0.5 and controlled.low > 0.5:
        if judge == "gold":
            return True, "Yes, PPO learned", "good"
        return None, "It learned to please the reward model", "mixed"
    if raw.high < 0.5:
        return False, "No, PPO got worse", "bad"
    if raw.low <= 0.5:
        return False, "No gain shown", "mixed"
    if controlled.high < 0.5:
        return False, "No: it wins by the length of its answers alone", "bad"
    return False, "Not shown: it may win by the length of its answers alone", "mixed"


def _sentence(found: Comparison, against_init: Comparison | None) -> str:
    by = "the gold score" if found.judge == "gold" else "the reward model, whose score PPO was trained to raise"
    further = ""
    if against_init is not None:
        further = (
            f" Against the model that PPO started from, it wins {percent_interval(against_init.raw)}; at equal length, "
            f"{percent_interval(against_init.length_controlled)}."
        )
    return (
        f"On {found.raw.prompts:,} held-out prompts, PPO's answers beat the supervised baseline's (SFT) in "
        f"{percent_interval(found.raw)} of comparisons; at equal length, in "
        f"{percent_interval(found.length_controlled)}.{further} The judge is {by}."
    )


def percent_interval(rate: WinRate | Accuracy) -> str:
    """For a sentence: "61.2 % (95 % interval 58.1–64.0)"."""
    return f"{100 * rate.rate:.1f} % (95 % interval {100 * rate.low:.1f}–{100 * rate.high:.1f})"
