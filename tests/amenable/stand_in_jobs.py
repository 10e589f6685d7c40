"""A stand-in for Ray's JobSubmissionClient: it keeps jobs in memory, and the test decides how each goes on."""

from types import SimpleNamespace
from typing import Any


class StandInJobs:
    """Jobs of a cluster. `lines` are the chunks of a log, by job; `breaks` how often a connection to it breaks."""

    def __init__(self) -> None:
        self.kept: dict[str, SimpleNamespace] = {}
        self.requests: list[dict[str, Any]] = []
        self.lines: dict[str, list[str]] = {}
        self.breaks = 0
        self.refuses: Exception | None = None
        self.stopped: list[str] = []
        self.after_stop = "STOPPED"
        self.ends_as: tuple[str, int | None] = ("SUCCEEDED", 0)

    def submit_job(self, **request: Any) -> str:
        if self.refuses is not None:
            raise self.refuses
        name = request["submission_id"]
        if name in self.kept:
            raise RuntimeError(f"Request failed with status code 500: Job with submission_id {name} already exists.")
        self.requests.append(request)
        self.add(name, request["metadata"], request["runtime_env"], "RUNNING")
        return name

    def add(self, name: str, metadata: dict[str, str], runtime_env: dict[str, Any], state: str) -> None:
        self.kept[name] = SimpleNamespace(
            submission_id=name,
            metadata=metadata,
            runtime_env=runtime_env,
            status=SimpleNamespace(value=state),
            message="",
            driver_exit_code=None,
            start_time=1000 * (len(self.kept) + 1),
            end_time=None,
        )

    def becomes(self, name: str, state: str, exit_code: int | None = None) -> None:
        self.kept[name].status = SimpleNamespace(value=state)
        self.kept[name].driver_exit_code = exit_code

    def list_jobs(self) -> list[SimpleNamespace]:
        return [*self.kept.values(), SimpleNamespace(metadata={"job_name": "somebody's"}, submission_id="other")]

    def get_job_info(self, name: str) -> SimpleNamespace:
        if name not in self.kept:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.kept[name]

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        self.becomes(name, self.after_stop)
        return True

    def get_job_logs(self, name: str) -> str:
        return "".join(self.lines.get(name, []))

    async def tail_job_logs(self, name: str):
        chunks = self.lines.get(name, [])
        if self.breaks:
            self.breaks -= 1
            for chunk in chunks[: len(chunks) // 2 + 1]:
                yield chunk
            raise RuntimeError("WebSocket connection closed unexpectedly")
        for chunk in chunks:
            yield chunk
        self.becomes(name, *self.ends_as)
