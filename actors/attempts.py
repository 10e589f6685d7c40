"""Attempts at a stage: which learner trained which update, and which of that is in the final weights.

A learner that starts, or starts again, begins an attempt. Its record, `attempts/attempt-000002.json` below the stage's
directory, is made once, under a number that nobody had before, and never changed: also of two learners that begin from
one checkpoint each has a number of its own. The newest attempt, the one whose checkpoint it began from, and so on, are
the committed lineage; every update has one owner on it, and what other attempts trained was rolled back.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpus.problems import RunProblem
from corpus.storage import write_atomically

SCHEMA_VERSION = 1
DIRECTORY = "attempts"
"""Where the records lie, in the stage's directory."""
COUNTS, TRAINED = "counts.json", "trained.json"

_RECORD = re.compile(r"attempt-(\d{6,})\.json")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage: its number, from 0, and what it began from."""

    number: int
    start: int
    """Updates trained in the checkpoint that it began from; 0 without one."""
    parent: int | None
    """The attempt that wrote that checkpoint; None without one."""
    started: str
    """ISO time in UTC."""
    run_epoch: int | None
    """The number of the run's holder (see `corpus.run_epoch`), where it is known."""
    identity: str
    """Hash of all that the stage reads."""


@dataclass(frozen=True)
class Segment:
    """Updates `start` + 1 to `end` (None: no end yet) of the committed lineage, which `attempt` trained."""

    attempt: int
    start: int
    end: int | None


def begin_attempt(
    directory: Path, start: int, run_epoch: int | None = None, parent: int | None = None, identity: str = ""
) -> Attempt:
    """Records a new attempt at the stage in `directory` and returns it. Its number is one more than any used before,
    also by an attempt that ended before it did anything. Raises RunProblem where the record cannot be written."""
    place = directory / DIRECTORY
    try:
        place.mkdir(parents=True, exist_ok=True)
        number = max([*_numbers(place), -1 if parent is None else parent]) + 1
        while True:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            attempt = Attempt(number, start, parent, started, run_epoch, identity)
            try:
                _write_new(place / f"attempt-{number:06d}.json", attempt)
            except FileExistsError:  # somebody else began at the same time: the number is theirs
                number += 1
                continue
            return attempt
    except OSError as error:
        raise RunProblem(
            f"{place}: the beginning of an attempt could not be recorded ({error.strerror}).", "storage/write"
        ) from error


def read_attempts(directory: Path) -> list[Attempt]:
    """The attempts at the stage in `directory`, oldest first. An attempt that died while it wrote its record has done
    nothing and is left out. Raises RunProblem where a record is not what this program writes."""
    place = directory / DIRECTORY
    found = []
    for number in sorted(_numbers(place)):
        path = place / f"attempt-{number:06d}.json"
        text = path.read_text(encoding="utf-8")
        if not text.endswith("}\n"):
            continue
        try:
            content = json.loads(text)
            version = content.pop("schema_version")
            attempt = Attempt(**content)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RunProblem(f"{path} cannot be read as the record of an attempt.", "run/damaged") from None
        if version != SCHEMA_VERSION:
            raise RunProblem(
                f"{path}: its schema version is {version}; this program reads {SCHEMA_VERSION}.", "run/schema-version"
            )
        if attempt.number != number:
            raise RunProblem(f"{path} says that it is of attempt {attempt.number}.", "run/damaged")
        found.append(attempt)
    return found


def committed_lineage(attempts: Sequence[Attempt]) -> list[Segment]:
    """The attempts whose work is in the weights of the newest one, oldest first, each with its updates.

    Raises RunProblem where the attempt that one began from is not there, or cannot have got so far.
    """
    by_number = {attempt.number: attempt for attempt in attempts}
    segments: list[Segment] = []
    number, end = max(by_number, default=None), None
    while number is not None:
        attempt = by_number.get(number)
        if attempt is None:
            raise RunProblem(
                f"Attempt {segments[0].attempt} began from attempt {number}, of which there is no record.",
                "run/damaged",
            )
        if end is not None and attempt.start > end:
            raise RunProblem(
                f"Attempt {segments[0].attempt} began with {end} updates of attempt {number}, which itself began with "
                f"{attempt.start}.",
                "run/damaged",
            )
        segments.insert(0, Segment(number, attempt.start, end))
        if attempt.parent is None and attempt.start > 0:
            raise RunProblem(
                f"Attempt {number} began with {attempt.start} updates and does not say whose.", "run/damaged"
            )
        if attempt.parent is not None and attempt.parent >= number:
            raise RunProblem(
                f"Attempt {number} began from attempt {attempt.parent}, which is not an earlier one.", "run/damaged"
            )
        number, end = attempt.parent, attempt.start
    return segments


def owner_of(update: int, attempts: Sequence[Attempt]) -> int | None:
    """The attempt whose training of `update` (from 1) is on the committed lineage. The newest attempt owns all that
    follow its start, trained or not; None where there is no attempt at all."""
    for segment in committed_lineage(attempts):
        if segment.start < update and (segment.end is None or update <= segment.end):
            return segment.attempt
    return None


def is_on_lineage(attempt: int, update: int, segments: Sequence[Segment]) -> bool:
    """Whether the weights called (`attempt`, `update`) are ones that the lineage `segments` went through."""
    return any(
        each.attempt == attempt and each.start <= update and (each.end is None or update <= each.end)
        for each in segments
    )


def write_counts(directory: Path, counts: Mapping[int, Mapping[str, int]]) -> None:
    """Writes `attempts/counts.json`: what the ledger of the stage in `directory` has counted, by attempt."""
    content = {"schema_version": SCHEMA_VERSION, "attempts": {str(number): counts[number] for number in sorted(counts)}}

    def write(stream: Any) -> None:
        stream.write((json.dumps(content, indent=1) + "\n").encode())

    write_atomically(directory / DIRECTORY / COUNTS, write)


def read_counts(directory: Path) -> dict[int, dict[str, int]]:
    """What `write_counts` wrote; empty where it wrote nothing. Raises RunProblem where it cannot be read."""
    path = directory / DIRECTORY / COUNTS
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, attempts = content["schema_version"], content["attempts"]
        found = {
            int(number): {str(key): int(count) for key, count in each.items()} for number, each in attempts.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunProblem(f"{path} cannot be read as the counts of a stage's attempts.", "run/damaged") from None
    if version != SCHEMA_VERSION:
        raise RunProblem(
            f"{path}: its schema version is {version}; this program reads {SCHEMA_VERSION}.", "run/schema-version"
        )
    return found


@dataclass(frozen=True)
class SavedProgress:
    """What a checkpoint says of how far learner and stream have come."""

    step: int
    """Updates trained."""
    attempt: int
    """The attempt that wrote it."""
    steps: dict[str, int]
    """By network, the steps that its optimiser has taken."""
    stopped_by: str
    """What ended training before its last update; empty where nothing did."""
    ledger: dict[str, Any]
    waiting: list[int]
    """Slots of the episodes in it, which wait to be trained."""

    @classmethod
    def of(cls, step: int, data: Mapping[str, Any], waiting: Sequence[int]) -> "SavedProgress":
        """From the data of a checkpoint. Raises KeyError, TypeError, ValueError or AttributeError where they are not
        such data."""
        ledger = dict(data["ledger"])
        for name in ("attempt", "version", "trained"):
            ledger[name] = int(ledger[name])
        ledger["accepted"] = list(ledger["accepted"])
        steps = {str(name): int(count) for name, count in data["steps"].items()}
        slots = [int(slot) for slot in waiting]
        return cls(int(step), int(data["attempt"]), steps, str(data["stopped_by"]), ledger, slots)

    @property
    def accepted(self) -> list[int]:
        """The slots that its ledger has accepted and not trained."""
        return [each[0] if isinstance(each, list) else each for each in self.ledger["accepted"]]


def write_trained(directory: Path, saved: SavedProgress) -> None:
    """Writes `attempts/trained.json`: what the last checkpoint of the stage in `directory` says, to outlive it."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(saved)}

    def write(stream: Any) -> None:
        stream.write((json.dumps(content) + "\n").encode())

    write_atomically(directory / DIRECTORY / TRAINED, write)


def read_trained(directory: Path) -> SavedProgress | None:
    """What `write_trained` wrote; None where it wrote nothing. Raises RunProblem where it cannot be read."""
    path = directory / DIRECTORY / TRAINED
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        found = SavedProgress.of(content["step"], content, content["waiting"]) if version == SCHEMA_VERSION else None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunProblem(f"{path} cannot be read as what a stage's last checkpoint says.", "run/damaged") from None
    if found is None:
        raise RunProblem(
            f"{path}: its schema version is {version}; this program reads {SCHEMA_VERSION}.", "run/schema-version"
        )
    return found


def _numbers(place: Path) -> list[int]:
    if not place.is_dir():
        return []
    return [int(match[1]) for path in place.iterdir() if (match := _RECORD.fullmatch(path.name))]


def _write_new(path: Path, attempt: Attempt) -> None:
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(attempt)}, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
