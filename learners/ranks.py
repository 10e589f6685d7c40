"""How many ranks a learner group has, what each reserves, and how they lie on nodes: what Ray Train is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.train import ScalingConfig

Placement = Literal["pack", "strict_pack", "spread"]
"""Ray's strategies for placement groups, but the one that forbids two ranks a node."""


@dataclass(frozen=True)
class Ranks:
    """A group of `workers` ranks, each with `threads` CPUs and `gpus` GPUs, on nodes with the Ray labels
    `node_labels`."""

    workers: int
    threads: int
    gpus: float = 0.0
    placement: Placement = "pack"
    node_labels: Mapping[str, str] = field(default_factory=dict)

    def beside(self) -> dict[str, Any]:
        """Ray's options of an actor whose loss ends the ranks' work as theirs does: it lies on nodes like theirs. Ray
        puts one that asks for no CPU on any."""
        return {"label_selector": dict(self.node_labels)} if self.node_labels else {}

    def scaling_config(self) -> "ScalingConfig":
        """Ray Train's: one placement group with a bundle a rank, in the strategy of `placement`."""
        from ray.train import ScalingConfig

        resources = {"CPU": float(self.threads)} | ({"GPU": self.gpus} if self.gpus else {})
        return ScalingConfig(
            num_workers=self.workers,
            use_gpu=self.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=self.placement.upper(),
            label_selector=dict(self.node_labels) or None,
        )
