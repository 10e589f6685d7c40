"""Whether commands of other programs, as the pages show them, can be right: their verbs and options, and that what
they name of this project is there. Ray's are parsed by Ray itself."""

import re
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import base_documents

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "docker" / "Dockerfile"
TAKEN_AS_SHOWN = frozenset({"cd", "cp", "curl", "export", "git", "kind", "lm_eval", "printf", "prometheus", "source"})
"""Programs and shell words of which nothing here can be wrong but the spelling of the name."""

KUBECTL: dict[str, frozenset[str]] = {
    "apply": frozenset({"-f", "-k"}),
    "config": frozenset({"--current", "--namespace"}),
    "cp": frozenset({"-c"}),
    "create": frozenset({"--from-file", "--from-literal", "-f"}),
    "delete": frozenset({"-f", "-k", "-l", "--wait"}),
    "describe": frozenset({"-l"}),
    "exec": frozenset({"-it", "-c"}),
    "get": frozenset({"-l", "-o", "-w", "--all-namespaces"}),
    "kustomize": frozenset(),
    "label": frozenset({"--overwrite"}),
    "logs": frozenset({"-f", "-l", "-c", "--tail", "--previous"}),
    "patch": frozenset({"--type", "-p"}),
    "port-forward": frozenset(),
    "wait": frozenset({"--for", "--timeout", "-l"}),
}
"""kubectl's verbs that the pages use, and their options; -n goes with each."""

BASE_RUN, RUN = "demo", "my-run"
"""The run whose manifests are packaged, and the one that the pages walk through."""

OF_KUBERNETES = frozenset(
    {"job", "namespace", "networkpolicy", "node", "pod", "pvc", "secret", "service", "storageclass", "svc"}
)
HELM = frozenset({"repo add", "repo update", "install", "upgrade", "uninstall"})


def problem_with_foreign(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    """What is wrong with another program's command; None for a right one. `inner` judges a command within it."""
    program = Path(words[0]).name
    if program in TAKEN_AS_SHOWN:
        return None
    judge = {"kubectl": _kubectl, "ray": _ray, "docker": _docker, "helm": _helm, "pip": _pip}.get(program)
    return judge(words[1:], inner) if judge else f"nobody here knows the program {program}"


def kinds() -> set[str]:
    """The kinds of object that a page may name to kubectl: Kubernetes' own, and those of the manifests."""
    found = set(OF_KUBERNETES)
    for path in (ROOT / "cluster" / "k8s").glob("*/*.yaml"):
        found |= {str(each["kind"]).lower() for each in yaml.safe_load_all(path.read_text()) if each}
    return found


def names() -> dict[str, set[str]]:
    """What the objects of the run that the pages walk through are called, by kind: those of the manifests, and those
    that KubeRay makes of them (ray-operator/controllers/ray/utils/util.go: GenerateHeadServiceName and
    GenerateServeServiceName; the submitter's Job has the RayJob's name)."""
    found: dict[str, set[str]] = {}
    for document in base_documents():
        name = re.sub(rf"^{BASE_RUN}\b", RUN, document["metadata"]["name"])
        found.setdefault(document["kind"].lower(), set()).add(name)
    services, clusters = found["rayservice"], found["raycluster"]
    return {
        "rayjob": found["rayjob"],
        "rayservice": services,
        "raycluster": clusters,
        "job": found["rayjob"],
        "service": {f"{name}-serve-svc" for name in services} | {f"{name}-head-svc" for name in services | clusters},
    }


def _kubectl(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    words, _, within = _parted(words, "--")
    verb = words[0] if words else ""
    if verb not in KUBECTL:
        return f"kubectl has no {verb!r} that a page may use"
    for option in (word.partition("=")[0] for word in words[1:] if word.startswith("-") and word != "-"):
        if option not in KUBECTL[verb] | {"-n"}:
            return f"kubectl {verb} has no option {option} that a page may use"
    folder = words[1] if verb == "kustomize" else words[words.index("-k") + 1] if "-k" in words else None
    if folder is not None and not (ROOT / folder / "kustomization.yaml").is_file():
        return f"{folder} has no kustomization.yaml"
    named = next((word for word in words[1:] if not word.startswith("-")), "")
    if verb in ("get", "delete", "describe", "wait") and not {"-f", "-k"} & set(words):
        named_kinds = named.partition("/")[0].split(",")
        wrong = [kind for kind in named_kinds if not {kind, kind.removesuffix("s")} & kinds()]
        if wrong:
            return f"there is no kind {wrong[0]!r}"
    objects = [word.split("/") for word in words[1:] if re.fullmatch(r"[a-z]+/[a-z0-9.-]+", word)]
    if len(words) > 2 and not words[1].startswith("-") and not words[2].startswith("-"):
        objects.append(words[1:3])
    for kind, name in objects:
        if name not in names().get(kind, {name}):
            return f"there is no {kind} {name}; a run called {RUN} has {sorted(names()[kind])}"
    return inner(within) if within else None


def _ray(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    from click.exceptions import ClickException
    from ray.scripts.scripts import cli

    words, _, within = _parted(words, "--")
    command: Any = cli
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"ray has no command {words[0]}"
        command = command.commands[words.pop(0)]
    try:
        command.make_context(command.name, [*words, *(["--", *within] if within else [])])
    except ClickException as error:
        return error.format_message()
    return inner(within) if within else None


def _docker(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    if words[:1] not in (["build"], ["push"]):
        return f"docker has no {words[:1]} that a page may use"
    text = DOCKERFILE.read_text()
    for option, value in pairwise(words):
        if option in ("-f", "--file") and not (ROOT / value).is_file():
            return f"there is no file {value}"
        if option == "--target" and not re.search(rf"^FROM .* AS {re.escape(value)}$", text, re.MULTILINE):
            return f"the Dockerfile has no target {value}"
        name = value.partition("=")[0]
        if option == "--build-arg" and not re.search(rf"^ARG {re.escape(name)}\b", text, re.MULTILINE):
            return f"the Dockerfile has no argument {name}"
    return None


def _helm(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    known = words[:1] and (words[0] in HELM or " ".join(words[:2]) in HELM)
    return None if known else f"helm has no {' '.join(words[:2])!r} that a page may use"


def _pip(words: list[str], inner: Callable[[list[str]], str | None]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in (name for word in words for name in re.findall(r"amenable\[([\w,]+)\]", word)):
        missing = set(name.split(",")) - set(extras)
        if missing:
            return f"amenable has no extra {sorted(missing)[0]}"
    return None if words[:1] in (["install"], ["download"]) else f"pip has no {words[:1]} that a page may use"


def _parted(words: list[str], at: str) -> tuple[list[str], str, list[str]]:
    if at not in words:
        return list(words), "", []
    where = words.index(at)
    return list(words[:where]), at, list(words[where + 1 :])
