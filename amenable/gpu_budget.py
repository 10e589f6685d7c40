"""GPU-hours of a run over all its attempts, and the stop with a checkpoint once the recipe's limit is used up.

A role's GPUs count from when the run asks for them until the command ends. The count is kept in RUN/gpu-hours.json,
from which the next command goes on; a command that is killed loses half a minute of it at most.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from amenable import interruption
from amenable.json_files import write_json
from corpus.problems import RunProblem

FILE = "gpu-hours.json"
LOOK_S = 1.0
"""Seconds between two looks at whether the limit is used up."""

SAVE_EVERY_S = 30.0
"""Seconds between two times that the count is written."""


def gpu_hours(gpus: float, seconds: float) -> float:
    """What `gpus` GPUs that are held for `seconds` come to."""
    return gpus * seconds / 3600


class GpuCount:
    """The GPU-hours that roles have used by a given time. Pure: it is told the time, in seconds of a clock."""

    def __init__(self, used: float = 0.0) -> None:
        self._used = used
        self._held: dict[str, float] = {}
        self._since = 0.0

    def hold(self, role: str, gpus: float, now: float) -> None:
        """From `now` on the role holds `gpus` GPUs."""
        self._used, self._since = self.at(now), now
        self._held[role] = gpus

    def at(self, now: float) -> float:
        """GPU-hours used by `now`."""
        return self._used + gpu_hours(sum(self._held.values()), max(now - self._since, 0.0))


class GpuBudget:
    """Counts a run's GPU-hours while a command works on it, and asks for a stop at the limit."""

    def __init__(
        self,
        path: Path,
        limit: float | None,
        clock: Callable[[], float] = time.monotonic,
        look_s: float = LOOK_S,
    ) -> None:
        """`path` is the file of the count; `limit` is in GPU-hours, None for none."""
        self._path, self._limit, self._clock, self._look_s = path, limit, clock, look_s
        self._count = GpuCount()
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def hold(self, role: str, gpus: float) -> None:
        """From now on the role holds `gpus` GPUs."""
        with self._lock:
            self._count.hold(role, gpus, self._clock())

    @property
    def used(self) -> float:
        """GPU-hours of the run so far, earlier commands' among them."""
        with self._lock:
            return self._count.at(self._clock())

    @contextmanager
    def counting(self, may_write: Callable[[], None]) -> Iterator[None]:
        """Around the work on the run. `may_write` raises RunProblem where this command may not write there any more.

        Raises interruption.LimitReached, at once where the limit is used up already, and in place of the Interrupted
        with which the work ends when a stop was asked for at the limit.
        """
        self._count = GpuCount(_read(self._path))
        if self._is_used_up():
            raise self._reached("the beginning")
        watch = threading.Thread(target=self._watch, args=(may_write,), name="gpu-budget", daemon=True)
        watch.start()
        try:
            yield
        except interruption.Interrupted as stop:
            if self._is_used_up():
                raise self._reached(str(stop)) from stop
            raise
        finally:
            self._is_over.set()
            watch.join(2 * self._look_s + 1.0)
            self._save(may_write)

    def _watch(self, may_write: Callable[[], None]) -> None:
        saved, asked = self._clock(), False
        while not self._is_over.wait(self._look_s):
            if self._is_used_up() and not asked:
                asked = True
                interruption.request()
            if self._clock() - saved > SAVE_EVERY_S:
                saved = self._clock()
                self._save(may_write)

    def _is_used_up(self) -> bool:
        return self._limit is not None and self.used >= self._limit

    def _reached(self, where: str) -> interruption.LimitReached:
        return interruption.LimitReached(
            f"limits.gpu_hours {self._limit:g} is used up at {where}: the run has had {self.used:.4g} GPU-hours. What "
            "was done is saved; with a higher limit the same command continues."
        )

    def _save(self, may_write: Callable[[], None]) -> None:
        used = self.used
        if used == 0:
            return
        try:
            may_write()
        except RunProblem:
            return  # another command has taken the run over and counts from what was written last
        write_json(self._path, {"schema_version": 1, "gpu_hours": round(used, 6)})


def _read(path: Path) -> float:
    """GPU-hours that earlier commands used. Raises RunProblem where the file cannot be read as that."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["gpu_hours"])
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunProblem(
            f"{path} does not say how many GPU-hours the run has used ({error}); write them there, as in "
            '{"schema_version": 1, "gpu_hours": 12.5}, or remove it to count from 0.',
            "run/damaged",
        ) from None
