"""Which metrics a report draws, grouped into panels, and what each panel tells its reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.figures import Series, line_chart, number, thin
from evaluation.markup import Markup, element, join
from evaluation.run_files import Curve

COLOURS = ("is-c1", "is-c2", "is-c3", "is-c4", "is-c5", "is-c6")


@dataclass(frozen=True)
class Panel:
    """One chart: its metrics with their short names, drawn together because they share a unit."""

    title: str
    explanation: str
    metrics: tuple[tuple[str, str], ...]
    reference: float | None = None


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


_LOSS = Panel("Loss", "Nats a token; lower is better.", (("loss", "training"), ("valid/loss", "held out")))
_RATE = Panel("Learning rate", "The size of a step, as scheduled.", (("lr", "policy"), ("lr_value", "value")))
_STEP_RATE = Panel("Learning rate", "The size of a step, as scheduled.", (("lr", "learning rate"),))
_NORM = Panel("Gradient norm", "Before clipping.", (("grad_norm", "norm"),))
_SPEED = Panel("Throughput", "Tokens trained on per second.", (("tokens_per_s", "tokens/s"),))
_MEMORY = Panel("Memory", "Of the learner at its peak, GiB.", (("peak_memory_bytes", "peak"),))

LANGUAGE_MODEL = (Group("", (_LOSS, _STEP_RATE, _NORM, _SPEED, _MEMORY)),)
"""Panels of the stages base, sft and ppo-init."""

REWARD_MODEL = (
    Group(
        "",
        (
            Panel(
                "Accuracy",
                "Share of held-out pairs in the labelers' order; guessing gives 0.5.",
                (("valid/accuracy", "held out"),),
                reference=0.5,
            ),
            Panel(
                "Loss",
                "−log σ of the score difference, over all pairs of a prompt; guessing gives 0.693.",
                (("loss", "training"), ("valid/loss", "held out")),
                reference=0.6931,
            ),
            _STEP_RATE,
            _NORM,
            _SPEED,
            _MEMORY,
        ),
    ),
)
"""Panels of the stage rm."""

PPO = (
    Group(
        "What is optimised",
        (
            Panel(
                "Reward model's score",
                "Of the rollouts: what PPO raises.",
                (("objective/scores", "mean"), ("objective/scores_std", "standard deviation")),
            ),
            Panel(
                "Score after the KL penalty",
                "The reward that PPO sees: the score minus the penalty for leaving the reference.",
                (("objective/rlhf_reward", "reward"), ("objective/non_score_reward", "KL penalty")),
            ),
            Panel(
                "KL to the reference",
                "Nats a sequence: how far the policy has moved from where PPO began.",
                (("objective/kl", "KL"),),
            ),
            Panel("KL coefficient", "The price of one nat of KL.", (("objective/kl_coefficient", "β"),)),
            Panel(
                "Pretraining loss (ptx)", "Rises where PPO forgets the language it came from.", (("loss/ptx", "ptx"),)
            ),
        ),
    ),
    Group(
        "How the answers change",
        (
            Panel(
                "Response length",
                "Tokens of a rollout's response.",
                (("response/length_mean", "mean"), ("response/length_std", "standard deviation")),
            ),
            Panel(
                "Cut off",
                "Share of responses that reached the limit instead of ending by themselves.",
                (("response/truncated_fraction", "cut off"),),
            ),
            Panel(
                "Ended by themselves",
                "Responses of a batch with an end-of-text token.",
                (("val/num_eos_tokens", "EOS"),),
            ),
            Panel(
                "Entropy of a sequence",
                "Nats, estimated from the sampled tokens; near 0 the policy says always the same.",
                (("objective/entropy", "entropy"),),
            ),
            Panel("Entropy of a token", "Nats: how undecided the policy is.", (("policy/entropy_avg", "entropy"),)),
        ),
    ),
    Group(
        "Health of the update",
        (
            Panel("Policy loss", "The clipped surrogate; it need not fall.", (("loss/policy_avg", "policy loss"),)),
            Panel("Value loss", "How wrong the critic is.", (("loss/value_avg", "value loss"),)),
            Panel(
                "Explained variance of the critic",
                "1 is a perfect critic, 0 is no better than the mean.",
                (("val/explained_variance", "explained variance"),),
                reference=0.0,
            ),
            Panel(
                "Clip fraction",
                "Share of tokens where the clip was active; much above 0.2 means steps that are too large.",
                (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")),
            ),
            Panel(
                "Approximate KL of an update", "Nats a token, new against old policy.", (("policy/approxkl_avg", "KL"),)
            ),
            Panel(
                "Probability ratio",
                "New policy over old; its mean stays near 1.",
                (("val/ratio", "mean"),),
                reference=1.0,
            ),
            Panel("Variance of the ratio", "Jumps when updates are too large.", (("val/ratio_var", "variance"),)),
            Panel(
                "Gradient norm",
                "Before clipping.",
                (("policy/gradient_norm", "policy"), ("val/gradient_norm", "value")),
            ),
            _RATE,
        ),
    ),
    Group(
        "Do engine and learner agree?",
        (
            Panel(
                "Mismatch of log-probabilities",
                "|log-ratio| of generator and learner on the same tokens; it should stay at rounding error.",
                (("mismatch/max_abs_log_ratio", "largest"), ("mismatch/mean_abs_log_ratio", "mean")),
            ),
            Panel(
                "Staleness",
                "By how many updates the weights that wrote a batch are older than those that learn from it.",
                (("staleness/version_lag_mean", "mean"), ("staleness/version_lag_max", "largest")),
            ),
            Panel(
                "Weight publication",
                "Seconds from the learner until the engines run the new weights, and their pause meanwhile.",
                (("sync/publish_seconds", "publication"), ("sync/pause_seconds", "pause")),
            ),
        ),
    ),
    Group(
        "The machine at work",
        (
            Panel(
                "Episodes per second",
                "Answers generated, scored and learned from.",
                (("throughput/episodes_per_second", "episodes/s"),),
            ),
            Panel(
                "Tokens per second",
                "Through the learner, while it works.",
                (("throughput/tokens_per_second", "tokens/s"),),
            ),
        ),
    ),
)
"""Panels of PPO; metrics under the prefixes of `_TOGETHER` are drawn together, whatever their names."""

_TOGETHER = (
    ("time/", "Seconds by phase", "Where the time of an update goes."),
    ("memory/", "Memory", "By role, GiB."),
    ("stream/", "Episode stream", "Episodes waiting, and those made again, met twice or refused, so far."),
)
_X_AXES = frozenset({"episode", "epoch"})


def stage_curves(groups: Sequence[Group], metrics: Mapping[str, Curve], x_label: str) -> Markup:
    """All panels of a stage; metrics that no panel names are drawn after them, panels without one are named."""
    parts: list[Markup] = []
    missing: list[Panel] = []
    named = {metric for group in groups for panel in group.panels for metric, _ in panel.metrics} | _X_AXES
    for group in groups:
        figures = []
        for panel in group.panels:
            figures.append(panel_figure(panel, metrics, x_label))
            if figures[-1] is None:
                missing.append(panel)
        if group is groups[-1]:
            figures += [panel_figure(panel, metrics, x_label) for panel in _together(metrics)]
        drawn = [figure for figure in figures if figure is not None]
        if drawn:
            parts.append(element("h4", group.title) if group.title else Markup())
            parts.append(element("div", drawn, class_="panels"))
    prefixes = tuple(prefix for prefix, _, _ in _TOGETHER)
    others = [name for name in sorted(metrics) if name not in named and not name.startswith(prefixes)]
    figures = [panel_figure(Panel(name, "", ((name, name),)), metrics, x_label) for name in others]
    if figures:
        parts.append(element("h4", "Other metrics"))
        parts.append(element("div", figures, class_="panels"))
    if missing:
        names = ", ".join(f"{panel.title} ({', '.join(metric for metric, _ in panel.metrics)})" for panel in missing)
        parts.append(element("p", f"Not recorded by this stage: {names}.", class_="absent"))
    return join(parts)


def panel_figure(panel: Panel, metrics: Mapping[str, Curve], x_label: str) -> Markup | None:
    """The panel as a figure with its heading, legend, and first and last values; None where nothing was recorded."""
    found = [(name, _readable(metric, metrics[metric])) for metric, name in panel.metrics if metric in metrics]
    series = [Series(name, *curve, colour) for (name, curve), colour in zip(found, _colours(len(found)), strict=True)]
    chart = line_chart(series, x_label, reference=panel.reference)
    if chart is None:
        return None
    legend = [
        element(
            "span",
            element("i", class_=one.colour) if len(series) > 1 else None,
            f"{one.name} " if len(series) > 1 else None,
            element("b", _course(one)),
            class_="key",
        )
        for one in series
    ]
    return element(
        "figure",
        element(
            "figcaption", element("strong", panel.title), element("span", panel.explanation), element("div", legend)
        ),
        chart,
        class_="panel",
        title=", ".join(metric for metric, _ in panel.metrics if metric in metrics),
    )


def _readable(metric: str, curve: Curve) -> Curve:
    """The curve in a unit for people: bytes become GiB."""
    if not metric.endswith("_bytes"):
        return curve
    return curve[0], [value / 2**30 for value in curve[1]]


def _together(metrics: Mapping[str, Curve]) -> list[Panel]:
    panels = []
    for prefix, title, explanation in _TOGETHER:
        names = [name for name in sorted(metrics) if name.startswith(prefix)]
        for first in range(0, len(names), len(COLOURS)):
            part = names[first : first + len(COLOURS)]
            panels.append(Panel(title, explanation, tuple((name, _short(name.removeprefix(prefix))) for name in part)))
    return panels


def _short(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _course(series: Series) -> str:
    """From where to where the curve goes, as its ends are drawn."""
    values = thin(series).y
    if not values:
        return "nothing finite"
    return number(values[0]) if len(values) == 1 else f"{number(values[0])} → {number(values[-1])}"
