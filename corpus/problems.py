"""The two errors a person meets. Their text is one clear sentence: what was wrong, where, what would be right.

Each has a code, "family/what" in small letters, which stays the same when the sentence changes: it stands behind the
sentence where a command ends, and in docs/troubleshooting.md with what to do. `amenable.error_codes` lists them all.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

CODE = r"[a-z]+(?:-[a-z]+)*/[a-z]+(?:-[a-z]+)*"
"""What a code looks like, as a regular expression."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Of an OSError: there is no room, or none is left of what one may have."""

UNEXPECTED = "run/unexpected"
"""The code of what nobody has foreseen."""

_IN_TRACEBACK = re.compile(
    rf"^(?:corpus\.problems\.)?(UsageProblem|RunProblem): (.+)(?:\n\[({CODE})\]$)?", re.MULTILINE
)


class _Coded(Exception):
    """An error of a sentence and a code."""

    def __init__(self, sentence: str, code: str) -> None:
        super().__init__(sentence, code)  # both, because unpickling calls this again with them
        self.sentence, self.code = sentence, code

    def __str__(self) -> str:
        return self.sentence


class UsageProblem(_Coded, ValueError):
    """Something the person gave is wrong (a recipe key, a file, a row). The command ends with exit code 2."""


class RunProblem(_Coded, RuntimeError):
    """The run itself could not go on (a NaN loss, a full disk). The command ends with exit code 1."""


@contextmanager
def code_in_traceback() -> Iterator[None]:
    """Around an actor's constructor, of whose error Ray keeps only the text: a problem's traceback has its code on a
    line of its own."""
    try:
        yield
    except (UsageProblem, RunProblem) as problem:
        problem.add_note(f"[{problem.code}]")
        raise


def problem_in_traceback(text: str) -> UsageProblem | RunProblem | None:
    """The first problem that the text of a traceback tells of; None where it tells of none. Without a code in the text,
    which `code_in_traceback` puts there, it has UNEXPECTED."""
    found = _IN_TRACEBACK.search(text)
    if found is None:
        return None
    sort = UsageProblem if found[1] == "UsageProblem" else RunProblem
    return sort(found[2], found[3] or UNEXPECTED)
