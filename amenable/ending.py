"""How a command ends: which exit code, which sentence, and one JSON answer on standard output where asked for.

0: done. 1: the run could not go on, or a mistake of the program (with its traceback). 2: something the person gave is
wrong. 3: a job that was waited for was stopped. 4: no cluster answered. 130: stopped on request.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from amenable.interruption import Interrupted, LimitReached
from amenable.remote_problems import problem_in
from cluster.address import Unreachable
from corpus import logs
from corpus.problems import RunProblem, UsageProblem

DONE = 0
RUN_PROBLEM = 1
USAGE_PROBLEM = 2
JOB_STOPPED = 3
UNREACHABLE = 4
INTERRUPTED = 130


@contextlib.contextmanager
def ending(as_json: bool, where: Callable[[], str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Around the work of a command: turns problems and interruptions into their sentence and exit code.

    Yields the function that gives the command's answer. With `as_json` the answer goes to standard output as JSON, and
    all else that is printed meanwhile goes to standard error; a problem is an answer too: `{"problem": …, "kind":
    "usage" | "run" | "unreachable" | "interrupted" | "limit"}`, the first three with their `code`
    (amenable.error_codes), which otherwise stands behind the sentence. Without, the answer is not printed. `where`
    tells where an interruption struck.
    """
    stdout = sys.stdout

    def answer(content: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(content, indent=2, ensure_ascii=False), file=stdout, flush=True)

    def end(kind: str, sentence: str, exit_code: int, code: str | None = None) -> typer.Exit:
        known = {"kind": kind} if code is None else {"kind": kind, "code": code}
        plain = sentence if code is None else f"{sentence} [{code}]"
        typer.echo(logs.line(sentence, "ERROR", **known) if logs.is_json() else plain, err=True)
        answer({"problem": sentence, **known})
        return typer.Exit(exit_code)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            yield answer
        except LimitReached as stop:
            raise end("limit", str(stop), INTERRUPTED) from None
        except Interrupted as stop:
            sentence = f"Interrupted at {stop}; the same command continues."
            raise end("interrupted", sentence, INTERRUPTED) from None
        except KeyboardInterrupt:
            sentence = f"Stopped at once at {where()}; the same command continues from what was last saved."
            raise end("interrupted", sentence, INTERRUPTED) from None
        except Exception as error:
            problem = problem_in(error)
            if problem is None:
                raise
            kind, exit_code = _sort_of(problem)
            raise end(kind, str(problem), exit_code, problem.code) from None


def _sort_of(problem: UsageProblem | RunProblem) -> tuple[str, int]:
    if isinstance(problem, UsageProblem):
        return "usage", USAGE_PROBLEM
    return ("unreachable", UNREACHABLE) if isinstance(problem, Unreachable) else ("run", RUN_PROBLEM)
