"""Which names a run may bear. A name becomes a directory, so it must not lead out of the place it was meant for."""

import re

from corpus.problems import UsageProblem

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(name: str) -> str:
    """Returns `name` where it is one plain path component; raises UsageProblem for all else ("..", "a/b", "")."""
    if not _RUN_NAME.fullmatch(name):
        raise UsageProblem(
            f"{name!r} cannot be the name of a run; use up to 100 letters, digits, '.', '_' and '-', "
            "and begin with a letter or a digit.",
            "recipe/name",
        )
    return name
