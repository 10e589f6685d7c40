"""JSON from outside: parsed, or told in one sentence what is wrong where."""

import json
from typing import Any

from corpus.problems import UsageProblem


def parse_json(text: str, place: str) -> Any:
    """The value that `text` holds. Raises UsageProblem, which begins with `place`, where it is no readable JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        what = error.msg.removesuffix(" at")
        raise UsageProblem(
            f"{place}: this is not JSON ({what} at {line}column {error.colno}).", "data/unreadable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise unreadable_json(place, error) from error


def unreadable_json(place: str, error: ValueError | RecursionError) -> UsageProblem:
    """The problem with JSON that is well-formed as far as it goes, but which Python does not read."""
    why = "it is nested too deeply" if isinstance(error, RecursionError) else "a number in it has too many digits"
    return UsageProblem(f"{place}: this JSON cannot be read ({why}).", "data/unreadable")
