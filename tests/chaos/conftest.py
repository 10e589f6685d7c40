"""Cells marked `chaos` are played where they are asked for (`-m chaos`) alone; their table goes into the docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests share

import pytest
import table
from harness import Outcome

HERE = Path(__file__).parent
PLAYED = pytest.StashKey[list[Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PLAYED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "chaos" in config.option.markexpr:
        return
    whole = [item for item in items if item.get_closest_marker("chaos")]
    if whole:
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in whole]


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = [outcome.row for outcome in session.config.stash[PLAYED]]
    if rows:
        table.PAGE.write_text(table.with_rows(table.PAGE.read_text(), rows, table.here(), table.now()))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for outcome in config.stash[PLAYED]:
        terminalreporter.write_line(" | ".join(outcome.row.values()))
        if outcome.said:
            terminalreporter.write_line(f"    said: {outcome.said}")


@pytest.fixture
def played(request) -> list[Outcome]:
    """The outcomes that go into the table."""
    return request.config.stash[PLAYED]


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A run as the stages before PPO leave it."""
    from toy_run import write_given  # imports torch

    return write_given(tmp_path_factory.mktemp("template") / "run")
