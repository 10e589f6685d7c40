"""The tiny run, made once for all modules that read it, with planted secrets in its environment."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.canaries import CANARIES
from tests.end_to_end.commands import RECIPE, finish, start


@pytest.fixture(scope="session")
def ray_directory() -> Iterator[Path]:
    """Where Ray keeps the logs of the tiny run. Its sockets are there too, whose paths may have some 100 letters."""
    directory = Path(tempfile.mkdtemp(prefix="amn-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_directory: Path) -> Path:
    """A folder in which the tiny recipe has been run; what the command has said is in stdout and stderr."""
    folder = tmp_path_factory.mktemp("tiny")
    out, err = finish(start(folder, "run", RECIPE, "--json", RAY_TMPDIR=str(ray_directory), **CANARIES))
    (folder / "stdout").write_text(out)
    (folder / "stderr").write_text(err)
    assert json.loads(out)["run"] == "tiny"  # nothing but the answer on standard output
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """The run's directory."""
    return folder / "runs" / "tiny"
