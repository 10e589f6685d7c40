"""A metrics.jsonl that somebody else appends to, read on from where the last look ended."""

import json
import os
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

RECENT = 20
"""Whole lines that are kept, for rates."""


class MetricsTail:
    """What has been read of one file: the last whole lines, and the curves of a few names from the beginning.

    A line that is being written has no end yet, and is read at a later look. A file that was cut back or written anew,
    as a run does that goes on from a checkpoint, is read from its beginning.
    """

    def __init__(self, path: Path, curves: Collection[str]) -> None:
        self._path, self._names = path, tuple(curves)
        self._begin()

    def _begin(self) -> None:
        self._offset, self._file = 0, (0, 0)
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        """The last lines, oldest first."""
        self.curves: dict[str, list[float]] = {name: [] for name in self._names}
        self.unreadable = 0
        """Whole lines that were no JSON objects with a step."""

    @property
    def newest(self) -> dict[str, Any]:
        """The last line; {} before the first."""
        return self.recent[-1] if self.recent else {}

    def look(self) -> None:
        """Reads what has been added. A file that is not there has no lines."""
        try:
            stream = open(self._path, "rb")  # noqa: SIM115 - closed by the block below
        except OSError:
            self._begin()
            return
        with stream:
            status = os.fstat(stream.fileno())
            file = (status.st_dev, status.st_ino)
            if file != self._file or status.st_size < self._offset:
                self._begin()
                self._file = file
            stream.seek(self._offset)
            added = stream.read()
        whole, end, _ = added.rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for line in whole.split(b"\n") if end else ():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError):
            self.unreadable += 1
            return
        self.recent.append(row)
        for name, values in self.curves.items():
            value = row.get(name)
            if isinstance(value, int | float):
                values.append(float(value))
