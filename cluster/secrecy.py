"""What looks like a secret, and must therefore stay out of a job's command line, metadata and runtime environment, and
out of a run's recipe.

Whoever may see Ray's dashboard may read the first three, and whoever may read a run's directory the last. A secret
belongs into the environment of the processes that use it, where a run finds it by its name.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from corpus.problems import UsageProblem

_SECRET_NAME = re.compile(
    r"((^|[._-])(token|secret|password|passwd|passphrase|credentials?|bearer|api_?key|access_?key|secret_?key|"
    r"private_?key|auth_?key)|[._-]pwd)([._-](id|file_content))?$",
    re.IGNORECASE,
)
"""Names whose values are secrets. In full words, so that tokens.max_prompt_tokens is none; nor is a shell's PWD."""

_SHAPES = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{16,}|\bAIza[A-Za-z0-9_-]{30,}|\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{16,}",
    "an AWS access key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of amenable serve": r"\bamn_[0-9a-f]{12}_[A-Za-z0-9_-]{20,}",
    "a signed web token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.",
    "a bearer token": r"\bBearer\s+[A-Za-z0-9._~+/-]{12,}",
    "a password in an address": r"://[^/\s:@?#]+:[^/\s@?#]+@",
    "a key in an option": r"[?&](\w+_)?(token|secret|password|api_?key|access_?key|secret_?key)=[^&\s]+",
}
"""Shapes of secrets that their makers document, and of addresses that carry one."""

_SHAPE = {says: re.compile(pattern) for says, pattern in _SHAPES.items()}

FOR_A_JOB = (
    "sees the cluster's dashboard",
    "set it in the environment of the cluster's nodes, and name the variable with --env NAME",
)

FOR_A_RUN = (
    "sees the run's directory, where the recipe is kept",
    "leave it out: keys of object stores, HF_TOKEN and what reward.token_variable names are read from the environment",
)

LEAST_LETTERS = 8
"""Values of this machine's secret variables shorter than this are not looked for: they would be found in any text."""


def is_secret_name(name: str) -> bool:
    """Whether a key or environment variable of this `name` holds a secret."""
    return _SECRET_NAME.search(name) is not None


def secret_shape(text: str) -> str | None:
    """What kind of secret `text` has in it, by its shape; None where it has none that is known."""
    return next((says for says, pattern in _SHAPE.items() if pattern.search(text)), None)


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` whose names are those of secrets and whose values are long enough to look for. One
    that names a file is none: the file is."""
    return {
        name: value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= LEAST_LETTERS and not os.path.exists(value)
    }


def check_no_secret(
    told: Any, environment: Mapping[str, str], where: str = "", remedy: tuple[str, str] = FOR_A_JOB
) -> None:
    """Raises UsageProblem where something in `told` (plain values, lists, mappings) is a secret by its key or shape, or
    has the value of a secret variable of this `environment` in it. The sentence says where, never what; `remedy` is who
    would read it, and what would be right."""
    held = secrets_of(environment)
    for key, text in _texts(told, where):
        if text and is_secret_name(key.rpartition(".")[2]):
            raise UsageProblem(_refusal(key, "by its name it is a secret", remedy), "secret/given")
        shape = secret_shape(text)
        if shape is not None:
            raise UsageProblem(_refusal(key, f"it has {shape} in it", remedy), "secret/given")
        name = next((name for name, value in held.items() if value in text), None)
        if name is not None:
            raise UsageProblem(_refusal(key, f"it has the value of {name} in it", remedy), "secret/given")


def check_override(override: str, environment: Mapping[str, str]) -> None:
    """Raises UsageProblem where the override KEY=VALUE holds a secret."""
    key, _, value = override.partition("=")
    check_no_secret(value, environment, key)


def check_variable(given: str) -> str:
    """Returns the name of an environment variable as --env takes it. Raises UsageProblem for a value given with it, and
    for what is no name; the sentence does not repeat what may be a secret."""
    name, equals, _ = given.partition("=")
    if equals:
        shown = name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) else "NAME"
        raise UsageProblem(
            f"--env {shown}=… gives a value, which everybody who sees the cluster's dashboard could read; give the "
            f"name alone, and set {shown} in the environment of the cluster's nodes.",
            "secret/given",
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", given) or secret_shape(given) is not None:
        raise UsageProblem(
            "--env takes the name of an environment variable, such as HF_TOKEN, and was given something else.",
            "secret/given",
        )
    return given


def _refusal(key: str, why: str, remedy: tuple[str, str]) -> str:
    readers, right = remedy
    return f"{key or 'Something that was given'} would be read by everybody who {readers}, and {why}; {right}."


def _texts(told: Any, where: str) -> Iterator[tuple[str, str]]:
    match told:
        case str():
            yield where, told
        case Mapping():
            for key, value in told.items():
                yield from _texts(value, f"{where}.{key}" if where else str(key))
        case list() | tuple():
            for value in told:
                yield from _texts(value, where)
