"""`amenable top RUN`: how a run is, drawn in a terminal, as plain lines elsewhere, or as JSON."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from amenable.braille import braille_plot
from amenable.durations import spoken
from amenable.run_directory import RunDirectory
from amenable.run_view import Curve, Role, RunView, Watch
from amenable.watched_run import watched
from corpus.problems import RunProblem

QUIET_AFTER_S = 60.0
"""Seconds without a new line after which a run under way is said to write nothing. House default."""

_CURVE_HEIGHT = 2
_WIDE = 110
"""Columns of a terminal from which on curves stand three in a row, else two."""


def watch(run: str, once: bool, every_s: float, answer: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Shows the run meant by `run` every `every_s` seconds, until Ctrl-C, which is no problem, or until all its stages
    are done; with `once` a single time. Where there is an `answer`, it is told each view as JSON, and nothing is drawn.

    Raises UsageProblem where there is no such run, and RunProblem where it cannot be read at the first look; a store
    that does not answer later is told of while the last view stays.
    """
    directory = RunDirectory.find(run)
    console = Console()
    is_live = console.is_terminal and not console.is_dumb_terminal and not once and answer is None
    with watched(directory) as files:
        look = Watch(files.root, directory.place)
        view, note = look.look(files.refresh()), ""
        if once:
            if answer is not None:
                answer(view.as_json())
            else:
                tell(console, view)
            return
        live = Live(console=console, auto_refresh=False) if is_live else None
        try:
            if live is not None:
                live.start()
            while True:
                _show(console, live, view, note, answer)
                if view.state == "done":
                    return
                time.sleep(every_s)
                try:
                    view, note = look.look(files.refresh()), ""
                except RunProblem as problem:
                    note = str(problem)
        except KeyboardInterrupt:
            return
        finally:
            if live is not None:
                live.stop()


def _show(
    console: Console,
    live: Live | None,
    view: RunView,
    note: str,
    answer: Callable[[dict[str, Any]], None] | None,
) -> None:
    if answer is not None:
        answer(view.as_json())
    elif live is not None:
        live.update(Group(picture(view, console.width), *([Text(note, style="yellow")] if note else [])), refresh=True)
    else:
        typer.echo("\n".join([*lines(view), *([note] if note else []), ""]))


def tell(console: Console, view: RunView) -> None:
    """Shows the view once: drawn in a terminal, else as plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(picture(view, console.width))
    else:
        typer.echo("\n".join(lines(view)))


# words -----------------------------------------------------------------------------------------------------------


def headline(view: RunView) -> str:
    """'running (HOST, process 12); newest line 2 s old'."""
    if view.state == "submitted":
        return "submitted; nothing of it has begun"
    who = {
        "running": f"running ({view.holder})",
        "done": "done",
        "stopped": "stopped: nobody works on it" + (f" (last: {view.holder})" if view.holder else ""),
    }[view.state]
    if view.age_s is None:
        return f"{who}; it has written nothing yet"
    age = f"newest line {spoken(view.age_s)} old"
    quiet = view.state == "running" and view.age_s > QUIET_AFTER_S
    return f"{who}; {age}{': it has written nothing since' if quiet else ''}"


def stage_line(view: RunView) -> str:
    """'[7 of 9 done] ppo, attempt 0, under way: 17 of 40 updates'; the stage alone where it counts nothing."""
    if not view.stage:
        return "No stage has begun."
    attempt = f", attempt {view.attempt}" if view.attempt is not None and view.stage == view.figures_of else ""
    told = f"[{view.stages_done} of {view.stages} done] {view.stage}{attempt}, {view.stage_state}"
    if view.stage != view.figures_of:
        return told
    return f"{told}: {amount(view)}" if amount(view) else told


def amount(view: RunView) -> str:
    """'17 of 40 updates'; empty where it is not known."""
    if view.total is None:
        return ""
    done = f"{view.done:.2f}" if view.unit == "epochs" else f"{view.done:,.0f}"
    return f"{done} of {view.total:,} {view.unit}"


def pace(view: RunView) -> str:
    """'2.1 s an update, 48 s left', as far as it is known."""
    parts = []
    if view.seconds_a_step is not None:
        each = "an update" if view.unit == "updates" else "a step"
        parts.append(f"{_seconds(view.seconds_a_step)} {each}")
    if view.seconds_left is not None and view.state == "running":
        parts.append(f"{spoken(view.seconds_left)} left")
    return ", ".join(parts)


def facts(view: RunView) -> list[str]:
    """Stream, staleness, publication and fleet, a line each, as far as there are figures."""
    found = []
    stream, staleness, publication, fleet = view.stream, view.staleness, view.publication, view.fleet
    if stream:
        names = {"accepted_waiting": "waiting", "generated": "accepted"}
        told = [f"{value:,.0f} {names.get(name, name)}" for name, value in stream.items()]
        found.append(f"slots: {', '.join(told)}")
    if staleness:
        lag = f"weights {staleness.get('version_lag_mean', 0):.2g} updates old on average"
        most = f"{staleness.get('version_lag_max', 0):.0f} at most"
        straggler = staleness.get("straggler_age_seconds")
        slowest = f"; slowest episode {_seconds(straggler)}" if straggler is not None else ""
        found.append(f"staleness: {lag}, {most}{slowest}")
    if publication:
        told = [
            f"{_seconds(publication[name])} {says}"
            for name, says in (("publish_seconds", "until every engine holds it"), ("pause_seconds", "standstill"))
            if name in publication
        ]
        found.append(f"publication: {', '.join(told)}")
    if fleet:
        wanted = f" of {view.wanted_generators} wanted" if view.wanted_generators is not None else ""
        others = [f"{value:.0f} {name}" for name, value in fleet.items() if name != "generators_serving" and value]
        told = [f"{fleet.get('generators_serving', 0):.0f}{wanted}", *others]
        found.append(f"generators that serve: {', '.join(told)}")
    found += [f"waits: {each}" for each in view.waiting]
    if view.served:
        pinned = f", pinned to {view.served['pinned']}" if view.served["pinned"] else ""
        versions = ", ".join(view.served["versions"])
        found.append(f"service: {view.served['replicas']} replicas with weights {versions}{pinned}")
    return found


def ending_lines(view: RunView) -> list[str]:
    """The verdict, the last problem, and lines that could not be read."""
    found = [view.verdict] if view.verdict and view.state == "done" else []
    if view.problem:
        found.append(f"last problem: {view.problem}")
    if view.unreadable_lines:
        found.append(f"{view.unreadable_lines} lines of metrics.jsonl could not be read.")
    return found


def lines(view: RunView) -> list[str]:
    """The whole view as plain lines."""
    found = [f"{view.run} ({view.place}): {headline(view)}", stage_line(view)]
    if view.stage and view.stage != view.figures_of:
        found.append(f"{view.figures_of}, the last stage with figures: {amount(view)}")
    found += [pace(view)] if pace(view) else []
    for role in view.roles:
        name, *cells = _cells(role)
        says = ("{}", "weights {}", "{} tokens/s", "{} busy", "{}")
        told = [template.format(cell) for template, cell in zip(says, cells, strict=True) if cell]
        found.append(f"{name}: {', '.join(told)}")
    return [*found, *facts(view), *map(curve_title, view.curves), *ending_lines(view)]


def curve_title(curve: Curve) -> str:
    """'KL 1.26 nats (0.0115 to 1.32, 40 values)'."""
    unit = f" {curve.unit}" if curve.unit else ""
    newest = f"{curve.name} {curve.values[-1]:.3g}{unit}"
    if len(curve.values) == 1:
        return newest
    return f"{newest} ({min(curve.values):.3g} to {max(curve.values):.3g}, {len(curve.values)} values)"


# pictures --------------------------------------------------------------------------------------------------------


def picture(view: RunView, width: int) -> Group:
    """The whole view as it is drawn in a terminal of `width` columns."""
    colour = {"running": "green", "done": "cyan"}.get(view.state, "yellow")
    rows: list[RenderableType] = [
        Text.assemble((view.run, "bold"), f"  {view.place}"),
        Text(headline(view), style=colour),
        Text(stage_line(view)),
    ]
    if view.stage and view.stage != view.figures_of:
        rows.append(Text(f"{view.figures_of}, the last stage with figures: {amount(view)}", style="dim"))
    if view.total:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=view.total, completed=view.done, width=28), Text(pace(view), style="cyan"))
        rows.append(bar)
    if view.roles:
        rows += [Text(), _roles(view.roles)]
    if facts(view):
        rows += [Text(), *(Text(each) for each in facts(view))]
    if view.curves:
        rows += [Text(), _curves(view.curves, width)]
    for each in ending_lines(view):
        rows.append(Text(each, style="yellow" if each.startswith("last problem") else ""))
    return Group(*rows)


def _roles(roles: Sequence[Role]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("role", "state"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    for name in ("weights", "tokens/s", "busy", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for role in roles:
        cells = _cells(role)
        style = {"healthy": "green", "dead": "red", "suspect": "yellow", "restarting": "yellow"}.get(role.state, "")
        table.add_row(cells[0], Text(cells[1], style=style), *cells[2:])
    return table


def _cells(role: Role) -> list[str]:
    """Name, state, weights, tokens a second, share of time at work, peak memory; empty where it is not known."""
    return [
        role.name,
        role.state,
        role.version or "",
        "" if role.tokens_per_second is None else f"{role.tokens_per_second:,.0f}",
        "" if role.busy_share is None else f"{role.busy_share:.0%}",
        "" if role.memory_bytes is None else f"{role.memory_bytes / 2**30:.1f} GiB",
    ]


def _curves(curves: Sequence[Curve], width: int) -> Table:
    columns = min(3 if width >= _WIDE else 2, len(curves))
    cell = (width - 2 * (columns - 1)) // columns
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        grid.add_column(width=cell, no_wrap=True)
    drawn = [
        Group(
            Text(_short_title(curve, cell), overflow="ellipsis", no_wrap=True),
            *(Text(line, style="cyan") for line in braille_plot(curve.values, cell - 2, _CURVE_HEIGHT)),
        )
        for curve in curves
    ]
    for start in range(0, len(drawn), columns):
        row = drawn[start : start + columns]
        grid.add_row(*row, *[""] * (columns - len(row)))
    return grid


def _short_title(curve: Curve, width: int) -> str:
    """The title, with less of it where it does not fit."""
    whole = curve_title(curve)
    return whole if len(whole) <= width else f"{whole.partition(', ')[0]})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else spoken(seconds)
