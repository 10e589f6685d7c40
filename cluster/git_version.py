"""Which commit a directory is at."""

import subprocess
from pathlib import Path

DEADLINE_S = 30.0
"""Seconds for git to answer; on a slow disk a large checkout takes some."""

UNKNOWN = "unknown"


def git_version(directory: Path) -> str:
    """The commit of the checkout that `directory` is in, with `-dirty` where a file of it differs; `unknown` where it
    is in none, or there is no git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return UNKNOWN
    changes = _git(directory, "status", "--porcelain", "--", ".")
    return commit if changes == "" else f"{commit}-dirty"


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None
