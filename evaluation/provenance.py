"""The report's sections on how a run was made: stages and their times, versions, data, recipe, how to do it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from evaluation.figures import bar_chart
from evaluation.markup import Markup, element, join
from evaluation.run_files import RunFiles, Stage
from evaluation.sections import table

_STATES = {"done": "✓", "unfinished": "unfinished", "absent": "not run"}

_WORDS = (
    (
        "SFT",
        "Supervised fine-tuning: the model imitates answers that people wrote. Also the baseline of the win rates.",
    ),
    ("Reward model (RM)", "A model trained on people's rankings of answers; it gives an answer a score."),
    (
        "PPO",
        "Proximal policy optimisation: the model answers, is scored, and what scored well is made likelier.",
    ),
    ("PPO-ptx", "PPO mixed with steps on pretraining text, so that the model does not forget its language."),
    ("KL", "How far the trained model's probabilities have moved from where it began, in nats; PPO pays for it."),
    (
        "Gold score",
        "A judge that training never sees. In the built-in world it is a program; elsewhere there may be none.",
    ),
    ("Win rate", "How often one model's answer to a prompt scores higher than another's; 50 % is no difference."),
    (
        "95 % interval",
        "Repeated on other prompts, such intervals would hold the true value 95 times in 100.",
    ),
    ("Length-controlled", "The win rate that a logistic regression predicts for answers of equal length."),
    ("EOS", "The end-of-text token, with which a model ends its answer itself."),
)


def flow(stages: list[Stage]) -> Markup:
    """The stages in their order, with their state and seconds."""
    items = []
    rounds = {stage.name.split("/")[0] for stage in stages if "/" in stage.name}
    for stage in stages:
        note = duration(stage.seconds) if stage.state == "done" and stage.seconds is not None else _STATES[stage.state]
        items.append(
            element(
                "li",
                element("b", stage.name if len(rounds) > 1 else stage.name.split("/")[-1]),
                " ",
                note,
                class_=stage.state,
            )
        )
    return element("ol", items, class_="flow", aria_label="Stages of the run")


def made_section(run: RunFiles) -> Markup:
    """Times, data, stage hashes, versions and the recipe."""
    parts: list[object] = [element("h2", "How this run was made"), element("h3", "Time by stage")]
    timed = [(stage.name, stage.seconds, duration(stage.seconds)) for stage in run.stages if stage.seconds is not None]
    if timed:
        total = sum(seconds for _, seconds, _ in timed)
        parts += [bar_chart(timed), element("p", f"{duration(total)} in all the stages above.", class_="fine")]
    else:
        parts.append(element("p", "No stage has recorded its time yet.", class_="absent"))
    parts.append(element("h3", "Configuration"))
    if run.recipe_text is None:
        parts.append(element("p", "recipe.yaml is not in the run directory.", class_="absent"))
    else:
        parts.append(element("p", "The resolved recipe: every setting, whether given or a default."))
        parts.append(_folded("recipe.yaml", run.recipe_text))
    if run.lineage is None:
        parts.append(
            element("p", "lineage.json is not in the run directory: no versions, data or hashes.", class_="absent")
        )
    else:
        parts += [_versions(run.lineage), _data(run.lineage), _rows(run.rows), _stage_hashes(run.lineage)]
    parts += [
        _folded(f"{one.name}: how the SFT epoch was selected", one.selection) for one in run.rounds if one.selection
    ]
    return element("section", parts, id="made")


def _folded(summary: str, text: str) -> Markup:
    return element("details", element("summary", summary), element("pre", text))


def _versions(lineage: Mapping[str, Any]) -> Markup:
    versions = _mapping(lineage, "versions")
    if not versions:
        return element("p", "Versions were not recorded.", class_="absent")
    items = [[name, str(version)] for name, version in versions.items()]
    return join([element("h3", "Versions"), table(["Package", "Version"], items, of_words=True)])


def _data(lineage: Mapping[str, Any]) -> Markup:
    data, sets = dict(_mapping(lineage, "data")), _mapping(lineage, "data_sets")
    for name, files in _mapping(lineage, "models").items():
        data |= {f"{name}: {file}": digest for file, digest in (files if isinstance(files, dict) else {}).items()}
    if not data and not sets:
        return element("p", "Data files were not recorded.", class_="absent")
    parts: list[object] = [element("h3", "Data")]
    if sets:
        items = [[name, *_licence(says)] for name, says in sets.items()]
        parts.append(table(["Data set", "Licence", "Stated by", "Commit"], items, of_words=True))
    if data:
        items = [[name, element("code", str(digest), class_="hash")] for name, digest in data.items()]
        parts.append(table(["File", "SHA-256 or commit"], items, of_words=True))
    return join(parts)


_COUNTS = {
    "long-prompts": "Left out: prompt too long",
    "long-responses": "Left out: response too long",
    "cut-responses": "Responses cut",
    "empty-documents": "Left out: empty",
    "split-documents": "Documents split",
}
"""What the data stage counts of each table, and the heading above it."""

_LEFT_OUT = "-left-out"


def _rows(rows: Mapping[str, int]) -> Markup | None:
    """The tables that the run read, and what their limits of length took from them."""
    tables = {
        name: count for name, count in rows.items() if not name.endswith((_LEFT_OUT, *(f"-{what}" for what in _COUNTS)))
    }
    if not tables:
        return None
    counted = {what: head for what, head in _COUNTS.items() if any(rows.get(f"{name}-{what}") for name in tables)}
    items = [
        [name, f"{count:,}", *(f"{rows.get(f'{name}-{what}', 0):,}" for what in counted)]
        for name, count in tables.items()
    ]
    parts: list[object] = [element("h3", "Rows"), table(["Table", "Rows", *counted.values()], items)]
    left_out = {name.removesuffix(_LEFT_OUT): count for name, count in rows.items() if name.endswith(_LEFT_OUT)}
    if left_out:
        listed = ", ".join(f"{count:,} of {part}" for part, count in left_out.items())
        text = f"Also left out of training, because their prompt is held out: {listed}."
        parts.append(element("p", text, class_="fine"))
    return join(parts)


def _licence(says: object) -> list[object]:
    told = says if isinstance(says, dict) else {}
    commit = told.get("commit")
    return [
        str(told.get("licence", "not stated")),
        str(told.get("licence_from", "–")),
        "–" if commit is None else element("code", str(commit)[:12], class_="hash"),
    ]


def _stage_hashes(lineage: Mapping[str, Any]) -> Markup:
    stages = _mapping(lineage, "stages")
    if not stages:
        return element("p", "No stage has been recorded in the lineage yet.", class_="absent")
    rows = [
        [
            name,
            ", ".join(str(parent) for parent in stage.get("parents", {})) or "–",
            element("code", str(stage.get("hash", "–"))[:16], class_="hash"),
        ]
        for name, stage in stages.items()
    ]
    note = element("p", "A stage is used again where the hash of all that it reads is unchanged.", class_="fine")
    return join([element("h3", "Lineage"), note, table(["Stage", "Made from", "Hash"], rows, of_words=True)])


def _mapping(lineage: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = lineage.get(key)
    return value if isinstance(value, dict) else {}


def reproduce_section(run: RunFiles) -> Markup:
    """The command that does it again, and what must be the same."""
    heading = element("h2", "Do it again")
    if run.recipe_text is None:
        text = "Without recipe.yaml this run cannot be repeated from its directory."
        return element("section", heading, element("p", text, class_="absent"), id="reproduce")
    seed = run.recipe.get("seed")
    again = shlex.quote(f"{run.name}-again")
    command = f"amenable run {shlex.quote(f'{run.name}/recipe.yaml')} name={again} run_directory={again}"
    return element(
        "section",
        heading,
        element("p", "With the versions above installed, from the directory that holds the run:"),
        element("pre", command),
        element(
            "p",
            f"The seed is {json.dumps(seed, default=str)}. " if seed is not None else None,
            "Data files must have the hashes above. On the same kind of machine the figures should come out the same "
            "or nearly so; on another, sums in another order change them slightly. Settings can be changed on the "
            "command line as key=value; finished stages are used again where what they read is unchanged.",
        ),
        id="reproduce",
    )


def words_section() -> Markup:
    """The terms that the report uses, for a reader who is new to them."""
    items = [(element("dt", term), element("dd", meaning)) for term, meaning in _WORDS]
    return element("section", element("h2", "Words used here"), element("dl", items), id="words")


def duration(seconds: float) -> str:
    """For a person: "48 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
