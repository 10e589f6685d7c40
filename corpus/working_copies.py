"""Where on this machine are the files of a run that an object store keeps: for who works on it, and for services."""

import hashlib
import os
import re
from pathlib import Path

from corpus.storage import without_options

WORKING_COPIES = "AMENABLE_WORKING_COPIES"
"""Environment variable: the directory of the working copies of runs that object stores keep."""

SERVED = "served"
"""Beside the working copies: the directory of the mirrors, which services of runs read."""


def working_copy(address: str) -> Path:
    """Where this machine works on the run at `address`: the same place for every command, and for no other run."""
    return _home() / _label(address)


def mirror(address: str) -> Path:
    """Where the services on this machine have what they serve of the run at `address`: not its working copy, which
    belongs to whoever holds the run's lease."""
    return _home() / SERVED / _label(address)


def _home() -> Path:
    home = os.environ.get(WORKING_COPIES) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "amenable", "runs"
    )
    return Path(os.path.abspath(os.path.expanduser(home)))


def _label(address: str) -> str:
    place = without_options(address)
    label = re.sub(r"[^A-Za-z0-9._-]", "-", place.rpartition("/")[2])
    digest = hashlib.sha256(f"{place}?{address.partition('?')[2]}".encode()).hexdigest()[:12]
    return f"{label}-{digest}"
