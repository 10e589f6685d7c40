"""`amenable status`, `list`, `logs` and `stop`: the jobs of a cluster, told to a person."""

import time
from datetime import UTC, datetime
from typing import Any

from amenable.durations import spoken
from cluster.job_server import JobServer
from cluster.jobs import STOPPED, Job, attempts_of, find_run, stop_grace
from corpus.problems import RunProblem

KILL_MARGIN_S = 15.0
"""Seconds beyond the grace for Ray to kill a job and say so. House default: its supervisor looks ten times a second."""


def status(server: JobServer, run: str, owner: str) -> dict[str, Any]:
    """The newest attempt of a run, with the states of those before it."""
    jobs = server.jobs()
    job = find_run(jobs, run, owner)
    attempts = attempts_of(jobs, job.labels.run)
    earlier = [{"attempt": each.labels.attempt, "state": each.state} for each in attempts if each != job]
    return job.as_json() | {"message": job.message, "other_attempts": earlier}


def told_status(answer: dict[str, Any], now: float | None = None) -> str:
    """What `status` returned, for a person."""
    lines = [
        f"{answer['run']}, attempt {answer['attempt']}: {answer['state'].lower()}{_since(answer, now or time.time())}",
        f"Kept in {answer['run_directory']}; recipe {answer['recipe']} at commit {answer['git']}.",
    ]
    for each in answer["other_attempts"]:
        lines.append(f"Attempt {each['attempt']}: {each['state'].lower()}")
    if answer["state"] == "FAILED":
        lines.append(
            answer["message"].strip().splitlines()[-1] if answer["message"].strip() else "Ray does not say why."
        )
    return "\n".join(lines)


def listed(server: JobServer, owner: str | None) -> list[Job]:
    """The newest attempt of each run, of `owner` or of everybody, the newest run last."""
    newest: dict[str, Job] = {}
    for job in server.jobs():
        if owner is None or job.labels.owner == owner:
            before = newest.pop(job.labels.run, None)
            newest[job.labels.run] = job if before is None or before.labels.attempt < job.labels.attempt else before
    return list(newest.values())


def told_list(jobs: list[Job]) -> str:
    """A line a run, for a person."""
    if not jobs:
        return "The cluster has no runs of yours; --all lists those of everybody."
    rows = [(job.labels.run, str(job.labels.attempt), job.state.lower(), _moment(job.started)) for job in jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def stop(server: JobServer, run: str, owner: str, grace_s: float | None) -> dict[str, Any]:
    """Ends the live job of a run: it saves a checkpoint, for which it has `grace_s` seconds, or as many as it was
    submitted with. Returns the job with `last_line`, the last that it wrote.

    Raises UsageProblem where no job of it is live or the grace is longer than Ray's, RunProblem where it has not ended
    by then.
    """
    job = find_run(server.jobs(), run, owner)
    patience_s = stop_grace(job, grace_s)
    server.stop(job.submission_id)
    is_rays = patience_s == job.grace_s
    ended = server.wait(job.submission_id, patience_s + (KILL_MARGIN_S if is_rays else 0.0))
    if ended.is_live:
        when = "by now" if is_rays else f"{spoken(job.grace_s)} after it was asked to end"
        raise RunProblem(
            f"{job.labels.run} has not ended within {spoken(patience_s)}; Ray kills it {when}, and what was saved "
            "before stands.",
            "job/not-ended",
        )
    lines = server.logs(job.submission_id).strip().splitlines()
    return ended.as_json() | {"last_line": lines[-1] if lines else ""}


def told_stop(answer: dict[str, Any]) -> str:
    """What `stop` returned, for a person."""
    run = answer["run"]
    if answer["state"] != STOPPED:
        return f"{run} came to its end by itself: {answer['state'].lower()}."
    return f"{run} is stopped. Its last line: {answer['last_line'] or '(none)'}"


def _since(answer: dict[str, Any], now: float) -> str:
    if answer["started"] is None:
        return ""
    if answer["ended"] is not None:
        return f", after {spoken(answer['ended'] - answer['started'])}"
    return f" for {spoken(now - answer['started'])}"


def _moment(unix_s: float | None) -> str:
    return (
        "" if unix_s is None else datetime.fromtimestamp(unix_s, UTC).isoformat(sep=" ", timespec="minutes")[:16] + "Z"
    )
