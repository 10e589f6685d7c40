"""The installer says what it downloads before it does, shows that it gets on, and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements" / "cpu.lock").read_text()
[TORCH] = re.findall(r"^torch==(.*)$", LOCK, re.MULTILINE)
PACKAGES = LOCK.count("==")

# A venv's interpreter that says how pip is called, and downloads nothing.
STAND_IN = """#!/bin/bash
case "$*" in
    *"pip index versions"*) echo "torch ($VERSIONS)"; echo "Available versions: $VERSIONS"; echo "lists versions" >&2;;
    *"pip install"*"-r "*)
        echo "CALLED pip $*"
        mkdir -p "$SITE/one-1.dist-info" "$TMPDIR/pip-unpack-1"
        sleep "$TAKES"
        exit "$ENDS";;
    *"pip install"*) echo "CALLED pip $*";;
    *compileall*) sleep "$TAKES"; exit 1;;
    -c*) echo "$SITE";;
esac
"""


class Installation:
    """What `requirements/install` did in `directory`."""

    def __init__(
        self, directory: Path, what: str = "run", versions: str = f"9.0.0, {TORCH}, 1.0", ends: int = 0
    ) -> None:
        site, temporary = directory / "venv" / "lib" / "python3.11" / "site-packages", directory / "tmp"
        for path in (site, temporary, directory / "venv" / "bin"):
            path.mkdir(parents=True)
        python = directory / "venv" / "bin" / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        settings = {
            "PYTHON": sys.executable, "VENV": str(directory / "venv"), "TORCH_INDEX": "https://torch.example/cpu",
            "TMPDIR": str(temporary), "SITE": str(site), "VERSIONS": versions, "TAKES": "2.5", "ENDS": str(ends),
            "TICK_S": "1",
        }  # fmt: skip
        self.ended = subprocess.run(
            ["bash", str(ROOT / "requirements" / "install"), what],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.lines = self.ended.stdout.splitlines()
        self.left = list(temporary.iterdir())

    def at(self, pattern: str) -> int:
        """The first line that has the pattern."""
        [first, *_] = [number for number, line in enumerate(self.lines) if re.search(pattern, line)]
        return first


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"))


def test_what_is_downloaded_is_said_before_pip_is_called(installed):
    assert installed.ended.returncode == 0, installed.lines
    assert installed.at(rf"Installing {PACKAGES} pinned packages .* 0\.9 GB to download") < installed.at("CALLED pip")
    assert not [line for line in installed.lines if "pip download" in line]


def test_a_line_tells_that_it_gets_on_without_a_terminal(installed):
    assert installed.at("CALLED pip") < installed.at(rf"^  [12] s: \d+ MB in hand, 1 of {PACKAGES} packages installed$")
    assert installed.at("^Compiling") < installed.at(r"^  [12] s: compiling$")


def test_no_temporary_directory_is_left(installed, tmp_path):
    assert installed.left == []
    failed = Installation(tmp_path, ends=3)
    assert (failed.ended.returncode, failed.left) == (3, [])
    assert not [line for line in failed.lines if "Compiling" in line]


def test_pytorchs_own_index_is_added_where_pip_finds_no_cpu_build_itself(installed, tmp_path):
    assert not [line for line in installed.lines if "torch.example" in line]
    without = Installation(tmp_path, versions=TORCH.partition("+")[0])  # PyPI's, which is for CUDA
    assert without.at(r"pip has no torch==.* by itself") < without.at("--extra-index-url https://torch.example/cpu")


def test_the_test_tools_are_told_and_counted_as_well(tmp_path):
    tools = Installation(tmp_path, what="test")
    count = (ROOT / "requirements" / "test.lock").read_text().count("==")
    assert tools.at("135 MB to download") < tools.at("CALLED pip") < tools.at(f"of {count} packages installed")
    assert tools.left == []
