"""The report of a run: one HTML file that needs nothing else, for a newcomer and for a researcher.

It is rebuilt from the run directory whenever wanted, also from an unfinished one: what is not there is said, not drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from corpus.storage import write_atomically
from evaluation.curves import LANGUAGE_MODEL, PPO, REWARD_MODEL, Group, stage_curves
from evaluation.markup import Markup, element, join
from evaluation.provenance import duration, flow, made_section, reproduce_section, words_section
from evaluation.run_files import Round, RunFiles, Stage, read_run
from evaluation.sections import (
    answers_section,
    frontier_section,
    models_section,
    reward_model_section,
    verdict_section,
)
from evaluation.style import CONTENT_SECURITY_POLICY, style_sheet

SYNTHETIC = (
    "Synthetic results: the prompts, the texts, the labels and the gold scores in this report come from a program that "
    "imitates people (the built-in world), not from people."
)
"""The first line of a report on the built-in world."""

_SECTIONS = (
    ("answers", "Answers"),
    ("models", "Models"),
    ("frontier", "Reward and KL"),
    ("reward-model", "Reward model"),
    ("curves", "Training curves"),
    ("made", "How it was made"),
    ("reproduce", "Do it again"),
    ("words", "Words"),
)
_CURVES: dict[str, tuple[tuple[Group, ...], str, str]] = {
    "base": (LANGUAGE_MODEL, "step", "Pretraining: the base model learns the language."),
    "sft": (LANGUAGE_MODEL, "step", "Supervised fine-tuning on demonstrations."),
    "rm": (REWARD_MODEL, "step", "The reward model learns from ranked answers."),
    "ppo-init": (
        LANGUAGE_MODEL,
        "step",
        "The model from which PPO starts: demonstrations mixed with pretraining text.",
    ),
    "ppo": (PPO, "update", "PPO raises the reward model's score, and pays for every nat of KL."),
}


def build_report(run_directory: Path) -> Path:
    """Writes `report.html` in the run directory, whole or not at all, and returns its path.

    Raises UsageProblem where there is no run directory or a file in it is not what its name says; RunProblem where
    the report cannot be written.
    """
    page = render(read_run(run_directory))
    path = run_directory / "report.html"

    def write(stream: IO[bytes]) -> None:
        stream.write(page.encode())

    write_atomically(path, write)
    return path


def render(run: RunFiles) -> str:
    """The page as text."""
    evaluated = [(one.name, one.results) for one in run.rounds if one.results is not None]
    sections: list[Markup] = []
    if evaluated:
        sections.append(verdict_section(evaluated[-1][1], evaluated[:-1][::-1]))
        latest = next(one for one in run.rounds if one.name == evaluated[-1][0])
        sections += _result_sections(latest)
    else:
        sections += [_not_evaluated(run), *_progress_sections(run)]
    sections += [curves_section(run), made_section(run), reproduce_section(run), words_section()]
    present = join(sections)
    links = [element("a", title, href=f"#{name}") for name, title in _SECTIONS if f'id="{name}"' in present]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_SECURITY_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{run.name} · amenable"),
        element("style", style_sheet()),
    )
    body = element(
        "body",
        element("p", element("b", SYNTHETIC), class_="synthetic") if is_synthetic(run) else None,
        _header(run, links),
        element("main", present),
        element("footer", "Made by amenable from the run's own files. This page loads nothing and runs nothing."),
    )
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def is_synthetic(run: RunFiles) -> bool:
    """Whether a program stood in for people: as evaluated, or before that, whether the recipe names no corpus."""
    known = [one.results.synthetic for one in run.rounds if one.results is not None]
    if known:
        return any(known)
    return "corpus" in run.recipe and run.recipe["corpus"] is None


def _header(run: RunFiles, links: list[Markup]) -> Markup:
    facts: list[tuple[str, str]] = []
    if run.lineage and run.lineage.get("created"):
        facts.append(("created", str(run.lineage["created"])))
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    if seconds:
        facts.append(("stages took", duration(sum(seconds))))
    if run.recipe.get("seed") is not None:
        facts.append(("seed", str(run.recipe["seed"])))
    if len(run.rounds) > 1:
        facts.append(("rounds", f"{len(run.rounds)}; results are those of the last one evaluated"))
    return element(
        "header",
        element("h1", run.name),
        element(
            "p",
            "A language model taught to follow instructions from feedback, in InstructGPT's three steps: imitate "
            "demonstrations (SFT), learn what people prefer (reward model), then practise against it (PPO).",
            class_="lede",
        ),
        element("p", [element("span", name, " ", element("b", value)) for name, value in facts], class_="facts"),
        flow(run.stages),
        element("nav", links, aria_label="Sections"),
    )


def _result_sections(one: Round) -> list[Markup]:
    assert one.results is not None
    return [
        answers_section(one.results.side_by_side),
        models_section(one.results, one.lengths),
        frontier_section(one.evaluations),
        reward_model_section(one.results.reward_model),
    ]


def _progress_sections(run: RunFiles) -> list[Markup]:
    """What an unfinished run can show already."""
    return [frontier_section(one.evaluations) for one in run.rounds[-1:] if one.evaluations]


def _not_evaluated(run: RunFiles) -> Markup:
    unfinished = [stage.name for stage in run.stages if stage.state == "unfinished"]
    return element(
        "section",
        element("p", "Did it learn to follow instructions?", class_="question"),
        element("h2", "Not known yet"),
        element(
            "p",
            "This run has not been evaluated: eval/results.json is not there, so there are no win rates, no answers "
            "side by side and no table of models. ",
            f"Unfinished: {', '.join(unfinished)}. " if unfinished else None,
            "The same command continues where it stopped.",
        ),
        class_="verdict mixed",
        id="verdict",
    )


def curves_section(run: RunFiles) -> Markup:
    """The curves of every stage that records metrics."""
    parts: list[object] = [
        element("h2", "Training curves"),
        element("p", "First and last value stand above each curve; point at a curve for figures in between."),
    ]
    silent: list[str] = []
    for stage in run.stages:
        kind = stage.name.rsplit("/", 1)[-1]
        if kind not in _CURVES:
            continue
        if stage.metrics:
            parts.append(_stage_section(stage, *_CURVES[kind]))
        else:
            silent.append(stage.name)
    if silent:
        parts.append(element("p", f"No metrics were recorded by: {', '.join(silent)}.", class_="absent"))
    return element("section", parts, id="curves")


def _stage_section(stage: Stage, groups: tuple[Group, ...], x_label: str, explanation: str) -> Markup:
    unfinished = " (unfinished)" if stage.state == "unfinished" else ""
    return join(
        [
            element("h3", f"{stage.name}{unfinished}"),
            element("p", explanation),
            stage_curves(groups, stage.metrics, x_label),
        ]
    )
