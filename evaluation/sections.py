"""The report's sections on results: verdict, answers, models, KL frontier, reward model. Each returns markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.figures import Interval, Series, histogram, interval_chart, line_chart, number
from evaluation.gold_curve import GoldCurve, fit_gold_curve
from evaluation.markup import Markup, element, join
from evaluation.run_files import Evaluation
from evaluation.schema import Accuracy, Comparison, Judge, ModelResult, Results, RewardModelResult, SideBySide
from evaluation.verdict import percent_interval, verdict
from evaluation.win_rate import WinRate

NAMES = {"base": "Base", "sft": "SFT", "ppo-init": "PPO init", "ppo": "PPO"}
MEANINGS = {
    "base": "the language model before any instruction",
    "sft": "fine-tuned on demonstrations: the baseline",
    "ppo-init": "where PPO starts, and what KL is measured from",
    "ppo": "trained against the reward model",
}
_COLOURS = {"base": "is-base", "sft": "is-sft", "ppo-init": "is-init", "ppo": "is-ppo"}
_NOTHING = "–"
SIDE_BY_SIDE = ("base", "sft", "ppo")


def verdict_section(results: Results, earlier: Sequence[tuple[str, Results]]) -> Markup:
    """The headline: a sentence and the dot-interval picture; verdicts of earlier rounds below."""
    found = verdict(results)
    parts: list[object] = [
        element("p", "Did it learn to follow instructions?", class_="question"),
        element("h2", found.headline),
        element("p", _unbroken(found.sentence)),
    ]
    judges: tuple[Judge, ...] = ("gold", "reward")
    span = _span(results.comparisons)
    for judge in judges:
        comparisons = [one for one in results.comparisons if one.judge == judge]
        if comparisons:
            parts.append(element("h3", _judge_heading(judge)))
            rows = [row for one in comparisons for row in _rows(one)]
            parts.append(interval_chart(rows, reference=50.0, span=span))
    if results.comparisons:
        parts.append(
            element(
                "p",
                "Filled dot: win rate as it is. Ring: win rate if both answers were equally long, because brevity or "
                "length alone is not following instructions. The line is the 95 % interval, clustered by prompt. "
                "The dashed level is 50\u00a0%: no better and no worse. Ties count half. ",
                f"{results.prompts:,} held-out prompts, {results.samples_per_prompt} answer(s) a model and prompt.",
                class_="fine",
            )
        )
    absent = [
        f"{NAMES[a]} against {NAMES[b]}"
        for a, b in (("ppo", "sft"), ("ppo", "ppo-init"))
        if results.comparison(a, b, found.judge) is None
    ]
    if absent:
        parts.append(element("p", f"Not compared in this run: {', '.join(absent)}.", class_="absent"))
    if found.judge == "reward":
        parts.append(
            element(
                "p",
                "There is no gold judge in this run. The reward model judges its own pupil, which shows that PPO "
                "raised the score it was given, not that people would prefer its answers.",
                class_="absent",
            )
        )
    for name, result in earlier:
        parts.append(element("p", _unbroken(f"{name}: {verdict(result).sentence}"), class_="fine"))
    return element("section", parts, class_=f"verdict {found.mood}", id="verdict")


def _unbroken(text: str) -> str:
    """The text with its per cent signs kept on the line of their figure."""
    return text.replace(" %", "\u00a0%")


def _span(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """The ends of all intervals, %, so that the pictures of all judges have one scale."""
    rates = [rate for one in comparisons for rate in (one.raw, one.length_controlled)]
    return 100 * min((rate.low for rate in rates), default=0.5), 100 * max((rate.high for rate in rates), default=0.5)


def _judge_heading(judge: Judge) -> str:
    return "Judged by the gold score, which training never saw" if judge == "gold" else "Judged by the reward model"


def _rows(found: Comparison) -> list[Interval]:
    name = f"{_name(found.model)} against {_name(found.against)}"
    colour = _colour(found.model)
    return [
        _interval(name, found.raw, colour),
        _interval("at equal length", found.length_controlled, colour, under=True),
    ]


def _interval(label: str, found: WinRate | Accuracy, colour: str, under: bool = False) -> Interval:
    low, rate, high = 100 * found.low, 100 * found.rate, 100 * found.high
    return Interval(label, rate, low, high, f"{rate:.1f} %  [{low:.1f}, {high:.1f}]", colour, under)


def _name(model: str) -> str:
    return NAMES.get(model, model)


def _colour(model: str) -> str:
    return _COLOURS.get(model, "is-c6")


def model_label(model: str) -> Markup:
    """A model's name after a dot of its colour."""
    return element("span", element("span", _name(model)), class_=f"model {_colour(model)}")


def answers_section(exchanges: Sequence[SideBySide]) -> Markup:
    """The same fixed prompts answered by every model."""
    parts: list[object] = [element("h2", "The same prompts, answered by each model")]
    if not exchanges:
        parts.append(element("p", "No answers were kept for reading.", class_="absent"))
        return element("section", parts, id="answers")
    present = [name for name in SIDE_BY_SIDE if name in exchanges[0].answers] or list(exchanges[0].answers)
    parts.append(
        element(
            "p",
            "The first prompts of the held-out set and the first sampled answer to each: nothing here was picked. RM "
            "is the reward model's score; ▲ marks the best answer of the row.",
        )
    )
    absent = [NAMES[name] for name in SIDE_BY_SIDE if name not in present]
    if absent:
        parts.append(element("p", f"Not in this run: answers of {', '.join(absent)}.", class_="absent"))
    parts += [_exchange(exchange, present) for exchange in exchanges]
    return element("section", parts, id="answers")


def _exchange(exchange: SideBySide, models: Sequence[str]) -> Markup:
    answers = {name: exchange.answers[name] for name in models if name in exchange.answers}
    best_reward = _best({name: answer.reward for name, answer in answers.items()})
    best_gold = _best({name: answer.gold for name, answer in answers.items()})
    cells = []
    for name, answer in answers.items():
        scores = [
            element("span", "RM ", element("b", _signed(answer.reward)), class_="best" if name == best_reward else "")
        ]
        if answer.gold is not None:
            gold = element("b", f"{answer.gold:.2f}".replace("-", "−"))
            scores.append(element("span", "gold ", gold, class_="best" if name == best_gold else ""))
        scores.append(element("span", f"{answer.length} tokens"))
        text = element("div", answer.text, class_="text", dir="auto") if answer.text.strip() else _empty(answer.text)
        cells.append(element("div", model_label(name), text, element("div", scores, class_="scores"), class_="answer"))
    prompt = element("div", exchange.prompt.strip(), class_="text", dir="auto")  # a dialogue begins with empty lines
    return element(
        "article",
        element("div", element("small", "Prompt"), prompt, class_="prompt"),
        element("div", cells, class_="answers"),
        class_="exchange",
    )


def _empty(text: str) -> Markup:
    return element("div", "(only white space)" if text else "(an empty answer)", class_="text absent")


def _best(scores: Mapping[str, float | None]) -> str | None:
    """The one model with the highest score; None where several share it, or only one has a score."""
    known = {name: score for name, score in scores.items() if score is not None}
    top = [name for name, score in known.items() if score == max(known.values())]
    return top[0] if len(top) == 1 and len(known) > 1 else None


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def models_section(results: Results, lengths: Mapping[str, Sequence[int]]) -> Markup:
    """The table of models, the parts of their gold score, and the lengths of their answers."""
    models = results.models
    columns: list[tuple[str, list[str]]] = [
        ("Gold score", [_optional(model.gold, ".3f") for model in models.values()]),
        ("RM score", [_signed(model.reward) for model in models.values()]),
        ("Tokens", [f"{model.length:.1f}" for model in models.values()]),
        ("Ended by itself", [f"{100 * model.eos_rate:.1f} %" for model in models.values()]),
        ("KL (nats)", [_optional(model.kl, ".2f") for model in models.values()]),
        ("Pretraining loss", [_optional(model.pretraining_loss, ".3f") for model in models.values()]),
    ]
    measured = [(heading, cells) for heading, cells in columns if set(cells) != {_NOTHING}]
    absent = [heading for heading, cells in columns if set(cells) == {_NOTHING}]
    labels = [join([model_label(name), element("small", f" {MEANINGS.get(name, '')}")]) for name in models]
    rows = [[label, *(cells[row] for _, cells in measured)] for row, label in enumerate(labels)]
    heads = ["Model", *(heading for heading, _ in measured)]
    parts: list[object] = [
        element("h2", "The models"),
        element(
            "p",
            f"Means over {results.prompts:,} held-out prompts. KL is to the model PPO began from, summed over a "
            "sequence; pretraining loss, in nats a token on text that was held out, rises where a model forgets.",
        ),
        table(heads, rows),
    ]
    if absent:
        parts.append(element("p", f"Not measured in this run: {', '.join(absent)}.", class_="absent"))
    if any(model.components for model in models.values()):
        parts.append(_components(models))
    parts.append(_lengths(lengths))
    return element("section", parts, id="models")


def _components(models: Mapping[str, ModelResult]) -> Markup:
    names = list(dict.fromkeys(name for model in models.values() for name in model.components))
    rows = [
        [model_label(name), *(_optional(model.components.get(part), ".3f") for part in names)]
        for name, model in models.items()
    ]
    heads = ["Model", *(name.replace("_", " ") for name in names)]
    return join([element("h3", "What the gold score is made of"), table(heads, rows)])


def _lengths(lengths: Mapping[str, Sequence[int]]) -> Markup:
    heading = element("h3", "Length of the answers")
    known = {name: values for name, values in lengths.items() if len(values)}
    if not known:
        return join(
            [
                heading,
                element(
                    "p", "The evaluation's answers were not kept, so there are no lengths to draw.", class_="absent"
                ),
            ]
        )
    longest = max(max(values) for values in known.values())
    width = max(1, math.ceil((longest + 1) / 48))
    edges = list(range(0, longest + width + 1, width))
    tallest = max(
        float(np.histogram(values, bins=np.asarray(edges))[0].max()) / len(values) for values in known.values()
    )
    figures = [
        element(
            "figure",
            element(
                "figcaption",
                model_label(name),
                element("span", f" mean {np.mean(values):.1f} tokens, median {np.median(values):.0f}"),
            ),
            histogram(values, edges, tallest, _colour(name), "tokens"),
            class_="panel",
        )
        for name, values in known.items()
    ]
    return join(
        [
            heading,
            element("p", "Share of answers by length, on one scale for all; the dashed line is the mean."),
            element("div", figures, class_="panels small"),
        ]
    )


def frontier_section(evaluations: Sequence[Evaluation]) -> Markup:
    """Proxy and gold reward against √KL, as PPO moved away from where it began."""
    parts: list[object] = [
        element("h2", "Reward against the distance travelled"),
        element(
            "p",
            "During PPO, held-out prompts are answered by the averaged (EMA) policy. Each dot is one such evaluation; "
            "the distance is √KL to the model PPO began from, the scale on which over-optimisation is plainest "
            "(Gao et al. 2022). Where the reward model's score climbs while the gold score falls, the policy exploits "
            "the reward model's mistakes.",
        ),
    ]
    if not evaluations:
        parts.append(element("p", "PPO recorded no evaluations (ppo/evaluations.jsonl is not there).", class_="absent"))
        return element("section", parts, id="frontier")
    distance = [math.sqrt(max(0.0, one.kl)) for one in evaluations]
    reward = Series("RM score", distance, [one.reward for one in evaluations], "is-reward")
    gold = Series(
        "gold score", distance, [math.nan if one.gold is None else one.gold for one in evaluations], "is-gold"
    )
    length = Series("tokens", distance, [one.length for one in evaluations], "is-c1")
    charts = [
        ("Gold score", "What is wanted; training never sees it.", gold),
        ("Reward model's score", "The proxy that PPO raises.", reward),
        ("Response length", "Whether the reward is bought with length.", length),
    ]
    figures = []
    for title, explanation, series in charts:
        chart = line_chart([series], "√KL (√nats)", dots=True, origin=True)
        if chart is not None:
            caption = element("figcaption", element("strong", title), element("span", explanation))
            figures.append(element("figure", caption, chart, class_="panel"))
    parts.append(element("div", figures, class_="panels"))
    if all(one.gold is None for one in evaluations):
        parts.append(
            element("p", "There is no gold judge in this run, so only the proxy can be drawn.", class_="absent")
        )
    curve = fit_gold_curve(distance, gold.y)
    if curve is not None:
        parts.append(element("p", _turn(curve, max(distance)), class_="fine"))
    last = evaluations[-1]
    parts.append(
        element(
            "p",
            f"{len(evaluations)} evaluations, the last after update {last.update} ({last.episodes:,} episodes), at KL "
            f"{number(last.kl)} nats a sequence; {100 * last.eos_rate:.1f}\u00a0% of its answers ended by themselves.",
            class_="fine",
        )
    )
    return element("section", parts, id="frontier")


def _turn(curve: GoldCurve, travelled: float) -> str:
    fit = (
        f"Gao et al.'s curve through the dots of the gold score, start + d (α − β ln d), has start "
        f"{number(curve.start)}, α {number(curve.alpha)} and β {number(curve.beta)}, by least squares. "
    )
    if curve.turn is None and curve.at(travelled) < curve.start:
        return fit + "It has no maximum, and lies below its start where the dots end: more reward was worse answers."
    if curve.turn is None:
        return fit + "It has no maximum: nothing in these dots says where more reward would be worse answers."
    where = "already passed" if curve.turn < travelled else f"beyond the {number(travelled)} that were travelled"
    return fit + (
        f"Its maximum is at √KL {number(curve.turn)}, {where}. Their law was measured without a KL penalty; from few "
        "dots it is a hint."
    )


def reward_model_section(found: RewardModelResult | None) -> Markup:
    """Accuracy of the reward model beside its baselines."""
    heading = element("h2", "The reward model")
    if found is None:
        text = "The accuracy of the reward model was not measured in this run."
        return element("section", heading, element("p", text, class_="absent"), id="reward-model")
    rows = [_interval("Reward model, held-out prompts", found.accuracy, "is-reward")]
    if found.heldout_labelers is not None:
        rows.append(_interval("Reward model, held-out labelers", found.heldout_labelers, "is-reward"))
    if found.gold_accuracy is not None:
        rows.append(_interval("Reward model, order of the gold score", found.gold_accuracy, "is-gold"))
    rows += [_interval(f"Baseline: {_words(name)}", one, "is-base") for name, one in found.baselines.items()]
    absent = [
        words
        for words, value in (
            ("labelers it never saw", found.heldout_labelers),
            ("the gold order", found.gold_accuracy),
            ("simpler baselines", found.baselines or found.baselines_left_out or None),
        )
        if value is None
    ]
    return element(
        "section",
        heading,
        element(
            "p",
            "How often it puts two answers in the order in which people (or the simulated labelers) put them: "
            f"{percent_interval(found.accuracy)} of {found.accuracy.pairs:,} held-out pairs. Ties are left out; the "
            "dashed level is guessing. What counts is how far it is above what simple means reach on the same pairs.",
        ),
        interval_chart(rows, reference=50.0),
        element("p", f"Not measured in this run: {', '.join(absent)}.", class_="absent") if absent else None,
        [
            element("p", f"Baseline left out: {_words(name)}: {reason}", class_="absent")
            for name, reason in found.baselines_left_out.items()
        ],
        id="reward-model",
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], *, of_words: bool = False) -> Markup:
    """A table that scrolls sideways where the page is narrow; `of_words` sets it left and narrow."""
    head = element("thead", element("tr", [element("th", name, scope="col") for name in heads]))
    body = element("tbody", [element("tr", [element("td", cell) for cell in row]) for row in rows])
    return element(
        "div",
        element("table", head, body),
        class_="scroll of-words" if of_words else "scroll",
        tabindex="0",
        role="region",
        aria_label="table",
    )


def _optional(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form).replace("-", "−")
