"""`amenable` as a process of its own, with the recipe of every stage in a minute or two."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = str(Path(__file__).parent / "tiny.yaml")
UPDATES = 6
"""Of PPO in that recipe."""


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The command in `folder`, as one who stands there gives it."""
    return subprocess.Popen(
        [sys.executable, "-m", "amenable", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for its end; returns what it said on standard output and on standard error."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, out[-1000:], err[-3000:])
    return out, err
