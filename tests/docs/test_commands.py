"""Every command, target, recipe key, manifest, link and anchor that the pages show is there."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from typer.core import TyperGroup
from typer.exceptions import TyperException

from amenable.cli import app
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from corpus.problems import UsageProblem
from docs.links import FENCE, anchor_of
from tests.docs.foreign_commands import problem_with_foreign

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:amenable|make) [^`]+)`(?!`)")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
COMMANDS = typer.main.get_command(app)
OPEN = ("…", "RECIPE", "NAME", "FILE", "KEY=VALUE", "DIR")
"""Words that stand for what a person puts there. Options beside them are checked, the recipe is not."""


def shell_lines(text: str) -> Iterator[str]:
    """The commands of a page: lines of bash blocks, and inline code that begins with amenable or make."""
    for language, block in BLOCK.findall(text):
        if language in ("bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.split("  #")[0].strip()
    yield from INLINE.findall(BLOCK.sub("", text))


def problem_with(line: str) -> str | None:
    """What is wrong with a command as it is shown; None for a right one."""
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    return _problem_with_words(words)


def _problem_with_words(words: list[str]) -> str | None:
    while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] == "time"):
        words.pop(0)
    if not words:
        return None
    if words[0] == "make":
        return _problem_with_make(words[1:])
    if Path(words[0]).name == "amenable":
        return _problem_with_amenable(words[1:])
    if Path(words[0]).name.startswith("python") and words[1:3] == ["-m", "amenable"]:
        return _problem_with_amenable(words[3:])
    if Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
        return None if importlib.util.find_spec(words[2]) else f"there is no module {words[2]}"
    if Path(words[0]).name.startswith("python") and words[1:2] == ["-c"]:
        return None
    if Path(words[0]).name.startswith("python") and words[1:]:
        return None if (ROOT / words[1]).is_file() else f"there is no file {words[1]}"
    return problem_with_foreign(words, _problem_with_words)


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
    command = COMMANDS
    name = ""
    while isinstance(command, TyperGroup):
        name = words[0].partition("|")[0] if words else ""
        if name not in command.commands:
            return f"there is no command {name}"
        command, words = command.commands[name], words[1:]
    if any(word.startswith("[") for word in words):  # as help shows it: what may be left out stands in brackets
        return None
    try:
        given = command.make_context(name, list(words)).params
    except TyperException as error:
        return f"{name}: {error!r}"
    if given.get("recipe") is None or any(word in OPEN or word.endswith("…") for word in words):
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


@pytest.mark.parametrize("page", [*PAGES, *FORMS], ids=lambda page: page.name)
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
        "amenable run RECIPE --jsn",
        "amenable report",
        "amenable tokens ad tokens.json ada",
        "amenable tokens add tokens.json ada --scope read",
        "amenable manifests demo --part train > run.yaml",
        ".venv/bin/amenable --verbose",
        "make demos",
        "make hh HHPATH=x",
        "python -m bench.nothing",
        "python -m amenable rum demo",
        "python docs/nothing.py",
        "kubectl aply -f run.yaml",
        "kubectl apply --file run.yaml",
        "kubectl get rayjobz",
        "kubectl get rayservice my-run",
        "kubectl delete rayjob my-run-train",
        "kubectl logs -f job/my-run-submit",
        "kubectl port-forward service/my-run-serve-svc 8000:8000",
        "kubectl wait --for=condition=Ready rayjob/my-job --timeout=30m",
        "kubectl apply -k cluster/k8s/overlays/nothing",
        "kubectl exec POD -- amenable rum demo",
        "ray job submitt --working-dir . -- python -m amenable run demo",
        "ray job submit --workdir . -- python -m amenable run demo",
        "ray job submit --working-dir . -- python -m amenable rum demo",
        "docker build -f cluster/docker/Dockerfil .",
        "docker build --target gpu .",
        "docker build --build-arg BASIS=x .",
        "helm instal kuberay-operator",
        "pip install 'amenable[hubb]'",
        "amenabel run demo",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line):
    assert problem_with(line)


def test_right_commands_pass():
    for line in (
        "amenable run hh seed=3 --json",
        "make hh HH_PATH=my/data",
        "amenable eval hh --comparisons x.jsonl",
        "amenable manifests demo --parts train > run.yaml",
        "kubectl get rayjob,pod -l amenable-run=demo",
        "kubectl exec POD -- amenable report /shared/runs/demo",
        "kubectl get rayservice my-run-serve",
        "kubectl port-forward service/my-run-serve-serve-svc 8000:8000",
        "kubectl port-forward service/RAYCLUSTER-head-svc 8265:8265",
        "kubectl get pods -l amenable-run=my-run",
        "docker build --target cuda --build-arg BASE=x -f cluster/docker/Dockerfile .",
    ):
        assert problem_with(line) is None
    assert list(shell_lines("a `make test` b\n```bash\namenable run hh \\\n  seed=1\n```\n")) == [
        "amenable run hh    seed=1",
        "make test",
    ]


def problem_with_yaml(text: str, folder: Path) -> str | None:
    """What is wrong with a block of YAML: a recipe, or what a person gives to kubectl. `folder` is for recipes."""
    if re.search("^apiVersion:", text, re.MULTILINE):
        return next(filter(None, map(_problem_with_manifest, yaml.safe_load_all(text))), None)
    extends = re.search(r"^extends: (\S+)", text, re.MULTILINE)
    if extends:
        text = text.replace(extends[1], str(ROOT / "recipes" / extends[1]))
    path = folder / "shown.yaml"
    path.write_text(text if re.search("^name:", text, re.MULTILINE) else f"name: shown\n{text}")
    return _problem_with_recipe(str(path), [])


def _problem_with_manifest(document: dict[str, Any]) -> str | None:
    try:
        kubernetes_validate.validate(document, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_and_manifest_shown_is_valid(page, tmp_path):
    blocks = [text for language, text in BLOCK.findall(page.read_text()) if language == "yaml"]
    assert [problem for problem in (problem_with_yaml(block, tmp_path) for block in blocks) if problem] == []


def test_a_block_of_yaml_with_a_typing_error_is_seen(tmp_path):
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec:\n  containers: [{name: one, image: one}]\n"
    assert problem_with_yaml(pod, tmp_path) is None
    assert problem_with_yaml(pod.replace("image", "imag"), tmp_path)
    assert problem_with_yaml("ppo: {updates: 3}\n", tmp_path) is None
    assert problem_with_yaml("ppo: {update: 3}\n", tmp_path)


def dead_links(text: str, page: Path) -> list[str]:
    """The links of a page within the project that lead to no file, or to no heading of a page."""
    dead = []
    for path, anchor in LINK.findall(BLOCK.sub("", text)):
        target = page.parent / path if path else page
        if not target.exists():
            dead.append(path)
        elif anchor and target.suffix == ".md":
            headings = re.findall(
                r"^#+ (.+)$", FENCE.sub("", text if target == page else target.read_text()), re.MULTILINE
            )
            if anchor not in map(anchor_of, headings):
                dead.append(f"{path}#{anchor}")
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page):
    assert dead_links(page.read_text(), page) == []


def test_a_link_that_leads_nowhere_is_seen():
    page = ROOT / "docs" / "plan.md"
    assert dead_links("## Some files\n[a](#some-files) [b](data.md#files) [c](../LICENSE)", page) == []
    assert dead_links("## Some files\n[a](#some-file)", page) == ["#some-file"]
    assert dead_links("[b](data.md#fils) [c](../LICENCE)", page) == ["data.md#fils", "../LICENCE"]
