"""What a command says at its end: tables of what came of the run, and where the report is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amenable.durations import spoken
from amenable.run_directory import RunDirectory
from amenable.summary import Summary
from evaluation.audit import StageAudit
from evaluation.results import table as results_table
from evaluation.schema import Accuracy, RewardModelResult, read_results

_SHOWN_PROBLEMS = 20
_WIDTH_OF_FILES = 140  # rich takes 80 where there is no terminal, and would fold the table in a log


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH_OF_FILES)


def short_path(path: str) -> str:
    """`path` as a person here would type it; an address as it is."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def tell_run(console: Console, summary: Summary) -> None:
    """Prints what came of a run: the verdict, one row a model, or the stages where nothing has been evaluated yet."""
    run = RunDirectory(summary.run_directory)
    results = run.latest_results()
    console.print()
    if summary.until in (None, "eval") and results is not None:
        found = read_results(results)
        if found.synthetic:
            console.print("Synthetic results: a program stood in for the people.", style="bold")
        _print_rows(console, results_table(found))
        if summary.verdict:
            _say(console, summary.verdict)
    else:
        _print_rows(
            console,
            [
                {
                    "stage": name,
                    "": "done before" if stage.reused else "done",
                    "time": spoken(stage.seconds),
                    "found": ", ".join(f"{key} {_shown(value)}" for key, value in stage.values.items()),
                }
                for name, stage in summary.stages.items()
            ],
        )
    if summary.report is not None:
        _say(console, f"Report: {(run.root if run.stored else Path(summary.run_directory)) / summary.report}")
    if summary.report is None or run.stored is not None:
        _say(console, f"Run directory: {run.name if run.stored else summary.run_directory}")


def tell_comparisons(console: Console, comparisons: str, result: RewardModelResult) -> None:
    """Prints how often the reward model and simpler means put the pairs of `comparisons` in the people's order."""
    rows = [_accuracy_row("reward model", result.accuracy)]
    rows += [_accuracy_row(name, accuracy) for name, accuracy in result.baselines.items()]
    console.print()
    _print_rows(console, rows)
    _say(console, f"Accuracy on the {result.accuracy.pairs:,} pairs of {comparisons}, with 95 % intervals.")


def tell_audit(console: Console, audit: StageAudit) -> None:
    """Prints what an audit found: one row an attempt, what is not as it must be, and the verdict."""
    console.print()
    _print_rows(
        console,
        [
            {
                "attempt": str(each.attempt),
                "updates": _updates(each.began_with, each.ended_with),
                **{
                    name: _count(getattr(each, name))
                    for name in ("admitted", "generated", "regenerated", "discarded", "trained")
                },
                "rolled back": str(each.rolled_back),
                "duplicated": str(each.duplicated),
                "lost": str(each.lost),
            }
            for each in audit.attempts
        ],
    )
    for problem in audit.problems[:_SHOWN_PROBLEMS]:
        _say(console, f"- {problem}")
    if len(audit.problems) > _SHOWN_PROBLEMS:
        _say(console, f"- and {len(audit.problems) - _SHOWN_PROBLEMS} more; --json has them all.")
    if not audit.finished:
        _say(
            console,
            f"{audit.stage} is not finished: {audit.updates} of {audit.planned} updates are in its newest checkpoint, "
            f"{audit.uncommitted} more are not yet in one; {audit.waiting} episodes wait there.",
        )
    _say(console, audit.verdict)


def _updates(began_with: int, ended_with: int | None) -> str:
    """The updates of an attempt that count."""
    if ended_with is None or ended_with <= began_with:
        return "–"
    return f"{began_with + 1} to {ended_with}"


def _count(count: int | None) -> str:
    return "–" if count is None else str(count)


def _accuracy_row(name: str, accuracy: Accuracy) -> dict[str, str]:
    return {
        "scored by": name,
        "pairs in the right order": f"{accuracy.rate:.1%} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
    }


def _print_rows(console: Console, rows: Sequence[Mapping[str, str]]) -> None:
    if not rows:
        return
    is_narrow = console.width < _WIDTH_OF_FILES
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0 if is_narrow else 1))
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_interval_below(cell) if is_narrow else cell) for cell in row.values()))
    console.print(table)


def _interval_below(cell: str) -> str:
    """'61.2% [58.1, 64.3]' on two lines, with the interval in one word, which is not folded."""
    figure, bracket, interval = cell.partition(" [")
    return f"{figure}\n[{interval.replace(', ', '–')}" if bracket else cell


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
