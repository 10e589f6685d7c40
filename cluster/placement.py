"""Room for single workers: each has a placement group of its own, so that one comes and goes without the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import spoken_bundle, spoken_labels


@dataclass(frozen=True)
class OwnPlacementGroup:
    """One placement group of one bundle for each worker, on a node with the Ray labels `node_labels`. A group that
    nobody releases ends with the job in which it was asked for, also where an actor asked for it that dies before."""

    bundle: Mapping[str, float]
    node_labels: Mapping[str, str] = field(default_factory=dict)

    def reserve(self, name: str) -> PlacementGroup:
        """Asks for room for the worker `name`; returns its placement group at once, whether there is room or not."""
        # None without any, which Ray's annotation leaves out: it refuses an empty list, as of another length.
        labels: Any = [dict(self.node_labels)] if self.node_labels else None
        return placement_group(
            [dict(self.bundle)], strategy="PACK", name=f"amenable-{name}", bundle_label_selector=labels
        )

    def wait(self, reserved: PlacementGroup, timeout_s: float) -> bool:
        """Whether there is room within `timeout_s`; blocks meanwhile."""
        return bool(reserved.wait(timeout_seconds=timeout_s))

    def options(self, reserved: PlacementGroup) -> dict[str, Any]:
        """Ray's options that put an actor into the group."""
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=0)}

    def release(self, reserved: PlacementGroup) -> None:
        """Gives the room back; what still runs there is ended by Ray."""
        try:
            remove_placement_group(reserved)
        except RayError:
            if ray.is_initialized():  # else the session, and the group with it, is over
                raise

    def says(self) -> str:
        """What is asked for, for a person."""
        return spoken_bundle(self.bundle) + spoken_labels(self.node_labels)
