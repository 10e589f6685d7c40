"""A stage's numbers over its steps: metrics.jsonl and TensorBoard, cut back to the step a run goes on from."""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from corpus.storage import write_atomically
from learners.exported_figures import ExportedFigures
from learners.tracking import WandbRun


class MetricsLog:
    """Appends to `directory`/metrics.jsonl, one JSON object a line, and to `directory`/tensorboard.

    A line is {"step": int, "time": unix seconds, name: number…}; a number that is not finite is null. `resumed_step`
    is the last step that the run has behind it: later lines, which a lost attempt wrote, are taken out. None starts
    anew. One process of a group makes one. What is logged is exported through `exported`, and told to a `tracker`, too.
    """

    def __init__(
        self,
        directory: Path,
        resumed_step: int | None = None,
        exported: ExportedFigures | None = None,
        tracker: WandbRun | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        self._events = directory / "tensorboard"
        self._resumed_step = resumed_step
        self._exported = exported
        self._writer: Any = None
        self._tracker = tracker
        self._last_step = resumed_step or 0
        if resumed_step is None:
            shutil.rmtree(self._events, ignore_errors=True)
        kept = [] if resumed_step is None else [row for row in read_metrics(self._path) if row["step"] <= resumed_step]
        write_atomically(self._path, lambda stream: stream.writelines(f"{json.dumps(row)}\n".encode() for row in kept))
        self._stream = open(self._path, "a")  # noqa: SIM115 (closed by `close`)
        if exported is not None:
            exported.begin(resumed_step or 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line and hands it to the operating system."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")
        self._stream.flush()
        self._last_step = step
        self._draw(step, finite)
        if self._tracker is not None:
            self._tracker.log(step, {name: value for name, value in finite.items() if value is not None})
        if self._exported is not None:
            self._exported.step(step, values)

    def sync(self) -> None:
        """Has the lines on the disk, where a loss of power leaves them and other machines see them."""
        os.fsync(self._stream.fileno())

    def evaluated(self, step: int, values: Mapping[str, float | None]) -> None:
        """What the weights of `step`, which may be some steps ago, came to on held-out prompts: for TensorBoard and the
        tracker. metrics.jsonl has one line a step, written by then; a value that is None or not finite is left out.

        A tracker takes no step again once a later one is there, so there it stands at the newest, with `eval/update`.
        """
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._draw(step, finite)
        if self._tracker is not None:
            self._tracker.log(self._last_step, {"eval/update": float(step), **finite})

    def _draw(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._writer is None:
            self._writer = self._open_tensorboard()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both files, and ends the tracker."""
        self._stream.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._exported is not None:
            self._exported.end()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        purge = None if self._resumed_step is None else self._resumed_step + 1
        return SummaryWriter(str(self._events), purge_step=purge)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a last line that a crash cut short is left out. [] if no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
