"""Live progress of a run: bars on a terminal, plain lines elsewhere, and never 30 silent seconds.

A thread of its own writes what the run is at, so a run that waits (for a model to load, for Ray to start) is not
silent either. In a terminal that is rich's live display; elsewhere at least one line every ten seconds.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from amenable import interruption
from amenable.durations import spoken
from amenable.stage_progress import StageProgress, Value
from corpus import logs

LINE_EVERY_S = 10.0
_REFRESHES_PER_SECOND = 4
_BAR_WIDTH = 28


class Progress:
    """What a run tells while it runs; the pipeline calls it, the command line shows it.

    `stages` are the names of all stages in their order, as far as they are known (`plan` states them later). With
    `json` everything goes to standard error, because standard output is for the one JSON answer. Where log lines are
    JSON (corpus.logs), what is told are log lines, there too.
    """

    def __init__(
        self,
        stages: Sequence[str] = (),
        *,
        json: bool = False,
        console: Console | None = None,
        line_every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = list(stages)
        self._as_log = logs.is_json()
        self._console = console or Console(stderr=json or self._as_log)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal and not self._as_log
        self._line_every_s = line_every_s
        self._clock = clock
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._started = clock()
        self._last_line = self._started
        self._stage: StageProgress | None = None
        self._waiting: tuple[str, float] | None = None
        self._nobody_listens = False
        self._live = Live(
            console=self._console,
            get_renderable=self._picture,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
        )

    def __enter__(self) -> "Progress":
        self._started = self._last_line = self._clock()
        if self._is_live:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._is_live:
            self._live.stop()
        else:
            self._ticker.join()

    def plan(self, stages: Sequence[str]) -> None:
        """States all stages in their order, where they were not known at the beginning."""
        with self._lock:
            self._stages = list(stages)

    def stage(self, name: str) -> None:
        """A stage begins. Raises ValueError for one that was not planned."""
        with self._lock:
            prefix = self._prefix(name)
            self._stage = StageProgress(name, self._clock())
        if not self._is_live:
            self._say(f"{prefix} started")

    def update(
        self, done: float, total: float | None = None, unit: str = "steps", values: Mapping[str, Value] | None = None
    ) -> None:
        """`done` of `total` units of the present stage are done; `values` are figures worth seeing now.

        Cheap: may be called at every step. Raises RuntimeError outside a stage.
        """
        with self._lock:
            if self._stage is None:
                raise RuntimeError("progress was made outside a stage")
            self._stage.update(self._clock(), done, total, unit, dict(values or {}))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While inside, what is shown is that the run waits for `what` ("the generator to start"), and how long."""
        with self._lock:
            before, self._waiting = self._waiting, (what, self._clock())
        try:
            yield
        finally:
            with self._lock:
                self._waiting = before

    def note(self, text: str) -> None:
        """Says one line now."""
        self._say(text)

    def finish_stage(self, summary: Mapping[str, Value] | str | None = None) -> float:
        """The present stage is done; says so with `summary`. Returns the seconds that it took."""
        with self._lock:
            if self._stage is None:
                raise RuntimeError("no stage is under way")
            stage, prefix = self._stage, self._prefix(self._stage.name)
            seconds = self._clock() - stage.started
            self._stage = None
        if isinstance(summary, Mapping):
            stage.values = summary
            summary = stage.figures()
        self._say(f"{prefix} done in {spoken(seconds)}{f' ({summary})' if summary else ''}")
        return seconds

    def reuse_stage(self, name: str, summary: str = "") -> None:
        """The stage `name` was done before and nothing that it reads has changed. Raises ValueError like `stage`."""
        with self._lock:
            prefix = self._prefix(name)
        self._say(f"{prefix} done before, and nothing it reads has changed{f' ({summary})' if summary else ''}")

    def where(self) -> str:
        """Where the run is, for a sentence: 'ppo, 17 of 48 updates'; 'the beginning' before the first stage."""
        with self._lock:
            if self._stage is None:
                return "the beginning" if self._waiting is None else f"waiting for {self._waiting[0]}"
            amount = self._stage.amount()
            return f"{self._stage.name}, {amount}" if amount else self._stage.name

    def _prefix(self, name: str) -> str:
        if name not in self._stages:
            raise ValueError(f"stage {name!r} is not among the planned {self._stages}")
        return f"[{self._stages.index(name) + 1} of {len(self._stages)}] {name}:"

    def _line(self) -> str:
        """All there is to say now."""
        now = self._clock()
        with self._lock:
            waiting = self._waiting and f"still waiting for {self._waiting[0]} ({spoken(now - self._waiting[1])})"
            if self._stage is None:
                return waiting or f"still working ({spoken(now - self._started)})"
            prefix, amount = self._prefix(self._stage.name), self._stage.amount()
            if waiting:
                return f"{prefix} {amount}; {waiting}" if amount else f"{prefix} {waiting}"
            return f"{prefix} {self._stage.line(now)}"

    def _tick(self) -> None:
        while not self._over.wait(min(1.0, self._line_every_s / 4)):
            if self._clock() - self._last_line >= self._line_every_s:
                self._say(self._line())

    def _say(self, text: str) -> None:
        if self._is_live:
            # Not under our lock: rich takes its own here, and takes ours after its own when it draws.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        with self._lock:
            self._last_line = self._clock()
            if self._nobody_listens:
                return
            try:
                print(logs.line(text) if self._as_log else text, file=self._console.file, flush=True)
            except BrokenPipeError:
                # The reader of the pipe (head, a closed terminal) has left; the run is worth more than its audience.
                self._nobody_listens = True

    def _picture(self) -> Group:
        """What the live display shows now. It draws over what the signal handler wrote, so it says that again."""
        stopping = [Text(interruption.STOPPING, style="yellow")] if interruption.requested() else []
        return Group(*self._rows(), *stopping)

    def _rows(self) -> list[Table | Text]:
        now = self._clock()
        with self._lock:
            stage = self._stage
            if stage is None or self._waiting is not None or not stage.amount():
                return [Text(self._line(), style="dim")]
            row = Table.grid(padding=(0, 1))
            row.add_row(
                Text(self._prefix(stage.name), style="bold"),
                ProgressBar(total=stage.total, completed=stage.done, width=_BAR_WIDTH, pulse=stage.total is None),
                Text(stage.amount()),
                Text(stage.pace(now), style="cyan"),
            )
            return [row, *([Text(stage.figures(), style="dim")] if stage.values else [])]
