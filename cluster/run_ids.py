"""What a run is called on a cluster, so that two people never share one and the same recipe is the same run again.

A run id is `owner/name-hash`: the hash is of the owner, of all that the resolved recipe says and of where the run is
kept. A submission id is the run id and the number of the attempt, with dots, because Ray puts it into paths of URLs.
"""

import getpass
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from corpus.problems import UsageProblem

OWNER = "AMENABLE_OWNER"
"""Environment variable: whose runs a person's submissions are, where --owner does not say."""

HASH_DIGITS = 10
"""Hexadecimal digits of a run id's hash: 40 bits, so that a million runs of one name collide with odds of a half."""

_OWNER = re.compile(r"[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?")
_RUN_ID = re.compile(rf"(?P<owner>{_OWNER.pattern})/[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{{{HASH_DIGITS}}}")


def owner_of(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Whose run it is: `given`, else the environment's AMENABLE_OWNER, else the person who is logged in.

    Raises UsageProblem for a name that is no plain one, and where nobody is known.
    """
    owner = given if given is not None else environment.get(OWNER)
    if owner is None:
        try:
            owner = getpass.getuser().lower()
        except (KeyError, OSError):  # a number without a name, as in many containers
            raise UsageProblem(
                "Nobody is logged in here by name; say whose run it is with --owner NAME.", "job/owner"
            ) from None
    if not _OWNER.fullmatch(owner):
        raise UsageProblem(
            f"{owner!r} cannot own a run; give --owner up to 40 small letters, digits, '-' and '_', with a letter or "
            "digit at both ends.",
            "job/owner",
        )
    return owner


def run_hash(owner: str, recipe: Mapping[str, Any], place: str, fresh: str = "") -> str:
    """What tells the run of `owner` from every other one: a hash of the resolved `recipe` (as JSON has it), of the
    `place` it is kept in, and of `fresh`, which a run that was begun anew has drawn."""
    told = {key: value for key, value in recipe.items() if key != "run_directory"}
    text = json.dumps([owner, told, place, fresh], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def run_id(owner: str, name: str, digest: str) -> str:
    """`owner/name-hash`."""
    return f"{owner}/{name}-{digest}"


def submission_id(run: str, attempt: int) -> str:
    """The id under which Ray knows attempt `attempt` (from 1) of a run."""
    return f"{run.replace('/', '.')}.{attempt}"


def is_run_id(text: str) -> bool:
    """Whether `text` is a whole run id."""
    return _RUN_ID.fullmatch(text) is not None
