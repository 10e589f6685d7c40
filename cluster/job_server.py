"""Ray's job server behind the dashboard of a cluster: every question has a deadline, every refusal a sentence."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from cluster.address import Place, Unreachable
from cluster.job_request import JobRequest
from cluster.jobs import Job, job_of
from corpus.problems import RunProblem, UsageProblem

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for the address of a dashboard."""

DEFAULT_URL = "http://127.0.0.1:8265"
"""Where Ray's dashboard is where nothing else was said."""

ANSWER_S = 60.0
"""Seconds for one answer of the server. House default: an upload of 100 MiB is stored within seconds."""

LOST_S = 180.0
"""Seconds for which a server that was there may be away while a job is followed. House default: a head that restarts
is back within two minutes."""

LOOK_S = 5.0
"""Seconds between two looks at a job that is followed."""

LAST_LINES_S = 15.0
"""Seconds for the last lines of a job that has ended."""


def dashboard_url(address: str | None) -> str:
    """The address of the cluster's dashboard: `address`, else RAY_API_SERVER_ADDRESS, else Ray's default on this
    machine. Raises UsageProblem for what cannot be one."""
    given = address or os.environ.get(API_SERVER) or DEFAULT_URL
    text = given if "://" in given else f"http://{given}"
    wrong = UsageProblem(
        f"Command line: {_masked(given)} is no address of a Ray dashboard; give http://HOST:8265. (auto, HOST:6379 and "
        "ray:// are for commands that join a cluster, such as amenable run.)",
        "cluster/address",
    )
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or any(letter.isspace() for letter in text):
        raise wrong
    if "@" in parts.netloc or parts.query or given == "auto" or port in (6379, 10001):
        raise wrong
    return text.rstrip("/")


class JobServer:
    """The job server at `url`, a dashboard's address. `client` stands in for Ray's in tests."""

    def __init__(self, url: str, client: Any = None) -> None:
        """Raises Unreachable where nobody answers, UsageProblem where the token is refused."""
        self.url = url
        with self._asking():
            self._client = client if client is not None else _client(url)

    def jobs(self) -> list[Job]:
        """The jobs that amenable submitted, of everybody, the oldest first. Raises as every question here does:
        Unreachable, UsageProblem for a token that is refused, RunProblem for an answer that is an error."""
        with self._asking():
            found = [job for job in map(job_of, self._client.list_jobs()) if job is not None]
        return sorted(found, key=lambda job: (job.started or 0.0, job.labels.attempt))

    def job(self, submission_id: str) -> Job:
        """One job, as it is now."""
        with self._asking():
            job = job_of(self._client.get_job_info(submission_id))
        if job is None:
            raise UsageProblem(
                f"{submission_id} was not submitted by amenable; ask for it with ray job status.", "job/not-found"
            )
        return job

    def submit(self, request: JobRequest) -> str:
        """Sends the working directory and begins the job; returns its submission id."""
        with self._asking():
            return self._client.submit_job(**asdict(request))

    def stop(self, submission_id: str) -> None:
        """Asks the job to end: SIGTERM, and SIGKILL after the grace it was submitted with."""
        with self._asking():
            self._client.stop_job(submission_id)

    def logs(self, submission_id: str) -> str:
        """All that the job has written so far."""
        with self._asking():
            return self._client.get_job_logs(submission_id)

    def wait(self, submission_id: str, deadline_s: float, sleep: Callable[[float], None] = time.sleep) -> Job:
        """The job once it has ended, or as it is after `deadline_s` seconds."""
        give_up = time.monotonic() + deadline_s
        while True:
            job = self.job(submission_id)
            if not job.is_live or time.monotonic() >= give_up:
                return job
            sleep(min(1.0, deadline_s))

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Job:
        """Hands what the job writes to `write` until it has ended, and returns it as it is then.

        A server that is away comes back within LOST_S seconds, or Unreachable is raised; the job goes on meanwhile, and
        nothing of what it writes is lost or told twice.
        """
        return asyncio.run(_Following(self, self._client, submission_id, write).until_the_end())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            said = str(error).strip().splitlines()[0]
            raise UsageProblem(
                f"The Ray cluster at {self.url} does not take this token ({said}); set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH to the file that holds the cluster's.",
                "cluster/token",
            ) from None
        except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
            raise unreachable(self.url, error) from error
        except RuntimeError as error:
            if isinstance(error, RunProblem):
                raise
            said = str(error).strip().splitlines()
            raise RunProblem(
                f"The Ray cluster at {self.url} refused: {said[0]} {said[-1] if said[1:] else ''}", "job/refused"
            ) from error


class _Following:
    """One job's log, followed over connections that may break."""

    def __init__(self, server: JobServer, client: Any, job: str, write: Callable[[str], None]) -> None:
        self._server = server
        self._client = client
        self._job = job
        self._write = write
        self._told = 0
        self._lost_at: float | None = None
        self._unwritten: Exception | None = None

    async def until_the_end(self) -> Job:
        while True:
            tail = asyncio.create_task(self._tail())
            try:
                job = await self._watch(tail)
            finally:
                tail.cancel()
                await asyncio.gather(tail, return_exceptions=True)
            if self._unwritten is not None:
                raise self._unwritten  # whoever reads has gone away: no connection mends that
            if job is not None:
                return job
            await asyncio.sleep(min(1.0, LOOK_S))

    async def _watch(self, tail: "asyncio.Task[None]") -> Job | None:
        """The job where it has ended; None where the connection broke, and another is to be made."""
        while True:
            await asyncio.wait({tail}, timeout=LOOK_S)
            job = await asyncio.to_thread(self._look)
            if job is not None and not job.is_live:
                await asyncio.wait({tail}, timeout=LAST_LINES_S)
                return job
            if tail.done():
                return None

    def _look(self) -> Job | None:
        """The job as it is; None while the server is away."""
        try:
            job = self._server.job(self._job)
        except Unreachable as problem:
            now = time.monotonic()
            self._lost_at = self._lost_at or now
            if now - self._lost_at > LOST_S:
                raise Unreachable(
                    f"{problem} It has been away for {LOST_S:.0f} s; the job goes on without being watched.",
                    "cluster/unreachable",
                ) from problem
            return None
        self._lost_at = None
        return job

    async def _tail(self) -> None:
        """Hands on what was not handed on before; a new connection begins at the first line again."""
        seen = 0
        async with aclosing(self._client.tail_job_logs(self._job)) as chunks:
            async for chunk in chunks:
                new = chunk[max(self._told - seen, 0) :]
                seen += len(chunk)
                if new:
                    self._told += len(new)
                    try:
                        self._write(new)
                    except Exception as error:  # noqa: BLE001 - raised by who waits
                        self._unwritten = error
                        return


def unreachable(url: str, error: BaseException) -> Unreachable:
    """The sentence for a dashboard that does not answer."""
    said = " ".join(str(error).split())[:200]
    return Unreachable(
        f"The Ray cluster's dashboard at {url} does not answer ({said}): is it running, and reachable from here?",
        "cluster/unreachable",
    )


def _client(url: str) -> Any:
    """Ray's client, with a deadline for every request. Raises what Ray's raises."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            # Ray's own waits for ever where a server takes the connection and says nothing.
            options.setdefault("timeout", ANSWER_S)
            return super()._do_request(method, endpoint, **options)

    parts = urlsplit(url)
    assert parts.hostname is not None, "dashboard_url has looked"
    refusal = Place(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)).refusal()
    if refusal is not None:
        raise ConnectionError(str(refusal))
    os.environ[API_SERVER] = url  # else Ray's client takes RAY_ADDRESS before the address that it is given
    return Client(url)


def _masked(address: str) -> str:
    """The address without what may be a password in it."""
    scheme, separator, rest = address.rpartition("://")
    return repr(f"{scheme}{separator}…@{rest.rpartition('@')[2]}" if "@" in rest else address)
