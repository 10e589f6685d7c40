"""Log lines of a run's processes, each with the run, the role and the worker that wrote it.

AMENABLE_LOG=json makes every line a JSON object: `time` (ISO, UTC), `level`, `run`, `role`, `worker`, `attempt`,
`node`, `message`, and where there are any `logger` and `error` (a traceback). Without it, or with AMENABLE_LOG=plain,
the same is said in short. Lines go to standard error, which Ray keeps for actors and gives to whoever follows a job.

Ray's own `LoggingConfig(encoding="JSON")` is not used: it names neither run nor role, takes over the command's own
output, and is of Ray alone, while the command speaks before there is Ray.
"""

import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from corpus.problems import UsageProblem

LOG = "AMENABLE_LOG"
"""Environment variable: json or plain."""

RUN = "AMENABLE_RUN"
"""Environment variable: the run's name, for processes that are started for it."""

ROOMS = ("amenable", "cluster", "serving", "evaluation", "learners", "actors", "objectives", "models", "corpus")
"""Loggers whose news are told too; of others, their warnings."""


@dataclass(frozen=True)
class Writer:
    """Who writes: what every line of this process says of it. `attempt` is PPO's, once there is one."""

    run: str
    role: str
    worker: str = ""
    attempt: int | None = None
    node: str = ""


_writer = Writer("", "driver")


def wanted(environment: Mapping[str, str] = os.environ) -> str:
    """ "json" or "plain". Raises UsageProblem for any other word."""
    found = environment.get(LOG) or "plain"
    if found not in ("json", "plain"):
        raise UsageProblem(f"{LOG}={found!r} in the environment should be json or plain.", "run/log-format")
    return found


def is_json() -> bool:
    """Whether lines are JSON objects. A word that is neither counts as plain: commands refuse it by `wanted`."""
    return os.environ.get(LOG) == "json"


def told_to_workers(run: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables by which processes of `run` write as this one does."""
    return {RUN: run} | ({LOG: environment[LOG]} if environment.get(LOG) else {})


def begin(role: str, worker: str = "", run: str | None = None) -> None:
    """From now on this process's log lines say that it is `worker` of `role`, and are of the form that is wanted. To be
    called once an actor or command begins; a second call replaces the first."""
    global _writer
    run = os.environ.get(RUN, "") if run is None else run
    _writer = Writer(run, role, worker, None, socket.gethostname())
    root = logging.getLogger()
    for each in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(each)
    handler = _Handler()
    handler.setFormatter(_Lines())
    root.addHandler(handler)
    for name in ROOMS:
        logging.getLogger(name).setLevel(logging.INFO)


def note_attempt(attempt: int) -> None:
    """From now on this process works for that attempt at PPO."""
    global _writer
    _writer = replace(_writer, attempt=attempt)


def line(message: str, level: str = "INFO", **others: Any) -> str:
    """One line, without its end, in the form that is wanted."""
    now = datetime.now(UTC)
    if is_json():
        said = {
            "time": now.isoformat(timespec="milliseconds"),
            "level": level,
            "run": _writer.run,
            "role": _writer.role,
            "worker": _writer.worker,
            "attempt": _writer.attempt,
            "node": _writer.node,
            "message": message,
            **{name: value for name, value in others.items() if value},
        }
        return json.dumps(said, ensure_ascii=False)
    who = [_writer.run, _writer.worker or _writer.role]
    who += [f"attempt {_writer.attempt}"] if _writer.attempt is not None else []
    about = " ".join(each for each in (*who, _writer.node) if each)
    text = f"{now.isoformat(sep=' ', timespec='seconds')[:19]}Z {level} [{about}] {message}"
    return f"{text}\n{others['error']}" if others.get("error") else text


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        error = "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info else ""
        return line(record.getMessage(), record.levelname, logger=record.name, error=error)


class _Handler(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument]
    """To whatever standard error is when a line is written: a live display puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Where lines go."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("the stream is always standard error")
