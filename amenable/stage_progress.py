"""How far one stage is: rate, time left, and the words for it. Pure: the caller says what time it is."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from amenable.durations import spoken

Value = float | int | str
_WINDOW_S = 60.0
_STALLED_AFTER_S = 20.0


@dataclass
class StageProgress:
    """The progress of one stage. Times are seconds of any clock that only goes forward."""

    name: str
    started: float
    done: float = 0
    total: float | None = None
    unit: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)
    _recent: deque[tuple[float, float]] = field(default_factory=deque)  # (time, done) of the last minute

    def update(self, now: float, done: float, total: float | None, unit: str, values: Mapping[str, Value]) -> None:
        """Notes that `done` of `total` units are done. Fewer than before (back to a checkpoint) start a new rate."""
        if self._recent and (done < self._recent[-1][1] or unit != self.unit):
            self._recent.clear()
        self.done, self.total, self.unit, self.values = done, total, unit, values
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()

    def rate(self) -> float | None:
        """Units a second over the last minute of updates; None until two updates have been seen."""
        if len(self._recent) < 2:
            return None
        (first_time, first_done), (last_time, last_done) = self._recent[0], self._recent[-1]
        if last_time <= first_time or last_done <= first_done:
            return None
        return (last_done - first_done) / (last_time - first_time)

    def seconds_left(self, now: float) -> float | None:
        """Seconds until the stage is done at the present rate; None where rate or total are unknown."""
        rate = self.rate()
        if rate is None or self.total is None:
            return None
        since_update = now - self._recent[-1][0]
        return max((self.total - self.done) / rate - since_update, 0.0)

    def amount(self) -> str:
        """'320 of 1,400 steps'; empty before the first update."""
        if not self._recent:
            return ""
        of_total = f" of {self.total:,}" if self.total is not None else ""
        return f"{self.done:,}{of_total} {self.unit}".rstrip()

    def pace(self, now: float) -> str:
        """'12.3 steps/s, 1 min 28 s left', as far as it is known."""
        rate, left = self.rate(), self.seconds_left(now)
        parts = []
        if rate is not None:
            per_second = rate >= 0.1
            shown = f"{rate:.3g}" if per_second else f"{60 * rate:.2g}"
            parts.append(f"{shown} {self.unit or 'units'}/{'s' if per_second else 'min'}")
        if left is not None:
            parts.append(f"{spoken(left)} left")
        return ", ".join(parts)

    def figures(self) -> str:
        """'loss 2.31, lr 0.001'."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.values.items())

    def line(self, now: float) -> str:
        """All of it on one line, without the stage's name."""
        if not self._recent:
            return f"still working ({spoken(now - self.started)})"
        parts = [part for part in (self.amount(), self.pace(now)) if part]
        text = ", ".join(parts)
        if self.values:
            text += f" ({self.figures()})"
        since_update = now - self._recent[-1][0]
        if since_update > _STALLED_AFTER_S:
            text += f"; no news for {spoken(since_update)}"
        return text


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
