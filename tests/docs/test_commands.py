"""Every command, target, recipe key and link that the pages show is there."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from amenable.cli import app
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from corpus.problems import UsageProblem

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:amenable|make) [^`]+)`(?!`)")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
COMMANDS = typer.main.get_command(app)
OPEN = ("…", "RECIPE", "NAME", "FILE", "KEY=VALUE", "DIR")
"""Words that stand for what a person puts there; a command with one of them is checked by its name alone."""


def shell_lines(text: str) -> Iterator[str]:
    """The commands of a page: lines of bash blocks, and inline code that begins with amenable or make."""
    for language, block in BLOCK.findall(text):
        if language in ("bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.split("  #")[0].strip()
    yield from INLINE.findall(BLOCK.sub("", text))


def problem_with(line: str) -> str | None:
    """What is wrong with a command of ours as it is shown; None for a right one, and for other programs' commands."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return None
    if words[0] == "make":
        return _problem_with_make(words[1:])
    if Path(words[0]).name == "amenable":
        return _problem_with_amenable(words[1:])
    if Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
        return None if importlib.util.find_spec(words[2]) else f"there is no module {words[2]}"
    if Path(words[0]).name.startswith("python") and words[1:]:
        return None if (ROOT / words[1]).is_file() else f"there is no file {words[1]}"
    return None


def _problem_with_make(words: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, equals, _ = word.partition("=")
        if equals and not re.search(rf"^{variable} \?=", makefile, re.MULTILINE):
            return f"the Makefile has no variable {variable}"
        if not equals and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            return f"the Makefile has no target {word}"
    return None


def _problem_with_amenable(words: list[str]) -> str | None:
    if not words or words[0].startswith("-"):
        return None if words in (["--help"], ["--version"]) else "there is no such option"
    assert isinstance(COMMANDS, TyperGroup)
    command = COMMANDS.commands.get(words[0].partition("|")[0])
    if command is None:
        return f"there is no command {words[0]}"
    if any(word in OPEN or word.endswith("…") for word in words[1:]):
        return None
    try:
        given = command.make_context(words[0], words[1:]).params
    except TyperException as error:
        return f"{words[0]}: {error!r}"
    if given.get("recipe") is None:
        return None
    return _problem_with_recipe(given["recipe"], given["overrides"] or [])


def _problem_with_recipe(recipe: str, overrides: list[str]) -> str | None:
    if recipe.startswith("my-"):  # one that the reader has written
        recipe = "hh"
    try:
        load_recipe(recipe if "/" not in recipe else ROOT / recipe, list(overrides), Recipe)
    except UsageProblem as problem:
        return str(problem)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_exists(page):
    wrong = {line: problem_with(line) for line in shell_lines(page.read_text())}
    assert {line: problem for line, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize(
    "line",
    [
        "amenable rum demo",
        "amenable run hh --jsn",
        "amenable run hh ppo.learning=1",
        "amenable run hh ppo.minibatches=7",
        "amenable run recipes/nowhere.yaml",
        "amenable report",
        ".venv/bin/amenable --verbose",
        "make demos",
        "make hh HHPATH=x",
        "python -m bench.nothing",
        "python docs/nothing.py",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line):
    assert problem_with(line)


def test_right_commands_pass():
    for line in ("amenable run hh seed=3 --json", "make hh HH_PATH=my/data", "amenable eval hh --comparisons x.jsonl"):
        assert problem_with(line) is None
    assert list(shell_lines("a `make test` b\n```bash\namenable run hh \\\n  seed=1\n```\n")) == [
        "amenable run hh    seed=1",
        "make test",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_shown_is_valid(page, tmp_path):
    for number, block in enumerate(text for language, text in BLOCK.findall(page.read_text()) if language == "yaml"):
        path = tmp_path / f"{number}.yaml"
        extends = re.search(r"^extends: (\S+)", block, re.MULTILINE)
        if extends:
            block = block.replace(extends[1], str(ROOT / "recipes" / extends[1]))
        path.write_text(block if re.search("^name:", block, re.MULTILINE) else f"name: shown\n{block}")
        load_recipe(path, [], Recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page):
    links = LINK.findall(BLOCK.sub("", page.read_text()))
    assert [link for link in links if not (page.parent / link).exists()] == []
