"""What looks like a secret, by its name, by its shape, or because this process has it in its environment.

Plain functions of text: what a secret must be kept out of, and with which sentence, is said where that is decided.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

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


def redacted(told: Any, environment: Mapping[str, str]) -> Any:
    """`told` (plain values, lists, mappings) with every secret replaced by words that say what was there: texts under
    keys that are names of secrets, of the shape of known secrets, and with the value of a secret variable of
    `environment` in them."""
    return _redacted(told, secrets_of(environment))


def _redacted(told: Any, held: Mapping[str, str]) -> Any:
    match told:
        case str():
            values = (f"the value of {name}" for name, value in held.items() if value in told)
            what = secret_shape(told) or next(values, None)
            return told if what is None else f"({what}, left out)"
        case Mapping():
            return {
                str(key): "(a secret, left out)"
                if value not in (None, "", [], {}) and is_secret_name(str(key))
                else _redacted(value, held)
                for key, value in told.items()
            }
        case list() | tuple():
            return [_redacted(each, held) for each in told]
        case _:
            return told
