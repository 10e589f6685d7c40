"""The tiny run, made once for all modules that read it."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.commands import RECIPE, finish, start


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny recipe has been run."""
    folder = tmp_path_factory.mktemp("tiny")
    out, _ = finish(start(folder, "run", RECIPE, "--json"))
    assert json.loads(out)["run"] == "tiny"  # nothing but the answer on standard output
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """The run's directory."""
    return folder / "runs" / "tiny"
