"""A worker that remembers what was reported to it."""

from learners.worker import Progress, Worker


class RecordingWorker(Worker):
    """One rank, alone; stops after `stop_after` questions."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[Progress] = []
        self.asked = 0

        def should_stop() -> bool:
            self.asked += 1
            return stop_after is not None and self.asked >= stop_after

        super().__init__(rank=0, world_size=1, report=self.reports.append, should_stop=should_stop)
