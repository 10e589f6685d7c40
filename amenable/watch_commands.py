"""The commands by which a run is watched from its files: top, history. `cli` adds them to the program."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from amenable.arguments import AsJson, Run
from amenable.ending import ending


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (top, history):
        app.command()(command)


def top(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Seconds between two looks at the run's files.")
    ] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a look, on one line; with --once one JSON answer.")
    ] = False,
) -> None:
    """Show how a run is, from its files: stage, roles, rates, weight versions, staleness, curves. Ctrl-C ends it."""
    stdout = sys.stdout  # with --json all else goes to standard error
    with ending(as_json, lambda: "the view") as answer:
        from amenable.top import watch

        def line(content: dict[str, Any]) -> None:
            print(json.dumps(content, ensure_ascii=False), file=stdout, flush=True)

        watch(run, once, every, (answer if once else line) if as_json else None)


def history(run: Run, as_json: AsJson = False) -> None:
    """Tell who submitted, ran, stopped, scaled or pinned a run, and when: its audit log."""
    with ending(as_json, lambda: "the history") as answer:
        from amenable.run_directory import RunDirectory
        from amenable.run_history import history as asked
        from amenable.run_history import told

        found = asked(RunDirectory.find(run))
        answer(found)
        if not as_json:
            typer.echo(told(found))
