"""Where a service finds the newest weights of the policy while PPO trains.

One interface, two feeds: the weight store, where the service runs in the Ray cluster that trains; RUN/published
everywhere else. Both give a file of this machine that holds a weight snapshot.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from actors.episodes import version_label
from actors.published import PublishedSnapshot
from actors.snapshot_files import Version, write_snapshot
from models.snapshot import Snapshot, verify
from serving.names import POLICY, Names, Weights

STORE_FILE = "store.json"
"""In the directory of a PPO stage under way: the Ray name of its weight store, and its cluster."""

ANSWER_S = 30.0
"""Seconds for the weight store to answer. House default."""

_PREFIX = "amenable-weights-"
_LIVES = "lives"
"""A file that a process locks for as long as it has the directory."""

KEPT = 2
"""Snapshots of the weight store that are kept as files: the present one, and the one before it for an engine that is
still reading."""

TAKES = 3
"""Times that weights are looked for at a start: what was published may be removed before it is read. House default."""

log = logging.getLogger(__name__)


class Feed(Protocol):
    """Where weights come from."""

    async def newest(self) -> Weights | None:
        """The newest weights of the policy; None where this feed has none. Raises RunProblem for damaged ones."""
        ...


class PublishedFeed:
    """RUN's own files: the export of PPO once it is done, published snapshots before."""

    def __init__(self, names: Names) -> None:
        self._names = names

    async def newest(self) -> Weights | None:
        """See `Feed`."""
        return await asyncio.to_thread(self._names.find, POLICY)


class StoreFeed:
    """The weight store of a PPO stage that trains in this Ray cluster. Snapshots are files in a directory of this
    process, which ends with it; the next feed on this machine removes that of a process that was killed."""

    def __init__(self, names: Names) -> None:
        self._names = names
        _remove_left()
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        partial = self._directory / f"{_LIVES}.partial"
        self._lives: int | None = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lives, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.replace(self._directory / _LIVES)  # nobody finds it unlocked
        self._have: dict[Version, PublishedSnapshot] = {}

    async def newest(self) -> Weights | None:
        """See `Feed`. None, too, where the store is in another cluster or does not answer."""
        store = await asyncio.to_thread(self._store)
        if store is None:
            return None
        try:
            found = await asyncio.wait_for(store.newest.remote(), ANSWER_S)
            if found is None:
                return None
            version, [reference] = tuple(found[0]), found[1]
            if version not in self._have:
                snapshot = await asyncio.wait_for(reference, ANSWER_S)
                self._have[version] = await asyncio.to_thread(self._kept, snapshot)
        except (RayError, TimeoutError) as error:
            log.warning("the weight store of %s does not answer: %r", self._names.round, error)
            return None
        return Weights(version_label(*version), snapshot=self._have[version])

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lives is not None:
            os.close(self._lives)
            self._lives = None

    def _store(self) -> Any:
        try:
            says = json.loads((self._names.round / "ppo" / STORE_FILE).read_text(encoding="utf-8"))
            if says["cluster"] != ray.get_runtime_context().gcs_address:
                return None
            return ray.get_actor(says["actor"], namespace=says["namespace"])
        except (OSError, ValueError, KeyError, TypeError):  # no PPO under way, or its store is gone
            return None

    def _kept(self, snapshot: Snapshot) -> PublishedSnapshot:
        verify(snapshot)
        path = self._directory / f"{version_label(*snapshot.version)}.safetensors"
        write_snapshot(path, snapshot)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        for version in sorted(self._have)[: max(0, len(self._have) - KEPT + 1)]:
            self._have.pop(version).weights.unlink(missing_ok=True)
        return PublishedSnapshot(snapshot.version, path, path.stat().st_size, digest, "store")


def _remove_left() -> None:
    """Removes the directories whose process has ended without removing them: nobody locks their file any more."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lives = os.open(directory / _LIVES, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # one that is just being made, or somebody else's
            continue
        try:
            fcntl.flock(lives, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # somebody has it, or the file system cannot tell
            continue
        finally:
            os.close(lives)


class NewestOf:
    """The first feed that has weights."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds = feeds

    async def newest(self) -> Weights | None:
        """See `Feed`."""
        for feed in self._feeds:
            found = await feed.newest()
            if found is not None:
                return found
        return None
