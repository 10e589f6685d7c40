"""What the commands write into a run's audit log, and `amenable history RUN`, which tells it.

`amenable submit` and `stop` run on a person's own machine, which may not see where the run is kept: a directory that
only the cluster's nodes mount, a store that answers no one else. So the job's own process records the submission, from
its metadata, when it begins; and `stop` does not wait long for a store.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from amenable.interruption import Interrupted
from amenable.remote_problems import problem_in
from amenable.run_directory import RunDirectory
from cluster.jobs import Job, Labels
from cluster.patience import call_within
from cluster.run_ids import submission_id
from cluster.under_job import job_id, job_metadata
from corpus import audit_log
from corpus.audit_log import BEGAN, DONE, ENDED, RESUMED, SUBMITTED, Entry, add, entry_now
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import is_object_store, without_options

log = logging.getLogger(__name__)

RECORD_S = 15.0
"""Seconds that a command on a person's machine waits for the place of a run. House default."""


def can_record(place: str) -> bool:
    """Whether this machine may write the audit log of the run at `place`: any address, and a directory that is a run's
    here. One that is not may be the mount of other machines, and is not made."""
    return is_object_store(place) or RunDirectory(place).is_a_run()


def record_from_here(place: str, entry: Entry) -> str:
    """Adds the entry to the audit log of the run at `place`, where this machine can within RECORD_S; returns the
    sentence that says why not, else nothing."""

    def record() -> None:
        if can_record(place):
            add(place, entry)

    try:
        problem = call_within(RECORD_S, record, lambda: None)
    except TimeoutError:
        where = without_options(place)
        return f"{where}: that the run was {entry.action} was not written to its audit log within {RECORD_S:g} s."
    if isinstance(problem, RunProblem | UsageProblem | OSError):  # what was asked is done, and that is what counts
        return str(problem)
    if problem is not None:
        raise problem
    return ""


def submission(labels: Labels, job: str) -> Entry:
    """The entry of a submission, from what the job says of itself."""
    asked = {
        "attempt": labels.attempt,
        "submission_id": job,
        "submitted": labels.at,
        "recipe": labels.asked.recipe,
        "overrides": list(labels.asked.overrides),
        "git": labels.git,
        "owner": labels.owner,
    }
    return entry_now(RESUMED if labels.attempt > 1 else SUBMITTED, asked, f"as {job}", actor=labels.by or None)


def record_own_submission(place: str, environment: Mapping[str, str] = os.environ) -> None:
    """In the process of a job of `amenable submit`: its submission is recorded, where whoever submitted could not, and
    once, however often this is called.

    Raises RunProblem where the log cannot be written."""
    labels, job = Labels.read(job_metadata(environment)), job_id(environment)
    if labels is None or job is None or job != submission_id(labels.run, labels.attempt):
        return
    entries, _ = audit_log.read(place)
    known = [entry.asked for entry in entries if entry.action in (SUBMITTED, RESUMED)]
    if (job, labels.at) not in [(asked.get("submission_id"), asked.get("submitted", "")) for asked in known]:
        add(place, submission(labels, job))


@contextmanager
def recorded_work(place: str, asked: Mapping[str, Any]) -> Iterator[None]:
    """Around a command's work on the run at `place`, of which it holds the lease: that it began, and how it ended.

    Raises RunProblem where the beginning cannot be recorded. That the end cannot be is told as a note of what ended it.
    """
    record_own_submission(place)
    job = job_id()
    add(place, entry_now(BEGAN, {**asked, **({"submission_id": job} if job else {})}))
    try:
        yield
    except BaseException as error:
        try:
            add(place, entry_now(ENDED, {}, _outcome(error)))
        except RunProblem as second:
            error.add_note(str(second))
        raise
    try:
        add(place, entry_now(ENDED, {}, DONE))
    except RunProblem as problem:  # the run is done, and is not failed by its log
        log.warning("%s", problem)


def _outcome(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return f"interrupted: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once"
    problem = problem_in(error) if isinstance(error, Exception) else None
    if problem is not None:
        return f"failed: {problem}"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def record_stop(job: Job, grace_s: float | None, outcome: str) -> str:
    """Records that a job was asked to stop; returns the sentence that says why it could not be, else nothing."""
    asked = {"attempt": job.labels.attempt, "submission_id": job.submission_id, "grace_s": grace_s}
    return record_from_here(job.labels.run_directory, entry_now(audit_log.STOPPED, asked, outcome))


def history(run: RunDirectory) -> dict[str, Any]:
    """What `amenable history` answers: the entries, the oldest first, and how many lines could not be understood."""
    entries, unreadable = audit_log.read(run.place)
    return {"run": run.name, "entries": [asdict(entry) for entry in entries], "unreadable": unreadable}


def told(answer: Mapping[str, Any]) -> str:
    """What `history` returned, for a person: an entry a line, what was asked below it."""
    lines = []
    for entry in answer["entries"]:
        who = entry["actor"] + (f" with the token {entry['token_name']!r}" if entry["token_name"] else "")
        lines.append(f"{entry['time'][:19].replace('T', ' ')}Z  {entry['action']:9}  {who}: {entry['outcome']}")
        asked = ", ".join(
            f"{key} {_shown(value)}" for key, value in entry["asked"].items() if value not in (None, [], "")
        )
        if asked:
            lines.append(f"{'':22}{asked}")
    if not lines:
        lines.append(f"{answer['run']} has no audit log yet.")
    if answer["unreadable"]:
        lines.append(f"{answer['unreadable']} more could not be understood: cut short, or of another version.")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
