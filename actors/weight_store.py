"""The weight store: owns the last two published snapshots, so that they outlive the learner that made them."""

from collections import OrderedDict
from typing import Any

import ray

from models.snapshot import Snapshot, verify

KEPT = 2
"""The present version, and the one before it for a generator that is still fetching."""


@ray.remote(num_cpus=0)
class WeightStore:
    """One a PPO stage. What it hands out are references into the object store: a node fetches a snapshot once."""

    def __init__(self) -> None:
        self._references: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def put(self, snapshot: Snapshot) -> list[Any]:
        """Check and keep `snapshot`; returns its reference (in a list, so that Ray does not resolve it on the way)."""
        verify(snapshot)
        reference = ray.put(snapshot)  # owned here: a learner's death would lose what it had put itself
        self._references[snapshot.version] = reference
        while len(self._references) > KEPT:
            self._references.popitem(last=False)
        return [reference]

    def hold(self, snapshot: Snapshot) -> list[Any]:
        """Check `snapshot` and keep it in the object store for as long as its reference (in a list) is held."""
        verify(snapshot)
        return [ray.put(snapshot)]

    def newest(self) -> tuple[tuple[int, int], list[Any]] | None:
        """Version and reference of the newest snapshot, or None before the first."""
        if not self._references:
            return None
        version = next(reversed(self._references))
        return version, [self._references[version]]
