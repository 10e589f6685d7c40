"""How many ranks a learner group has, what each reserves, and how they lie on nodes: what Ray Train is asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.train import ScalingConfig

Placement = Literal["pack", "strict_pack", "spread"]
"""Ray's strategies for placement groups, but the one that forbids two ranks a node."""


@dataclass(frozen=True)
class Ranks:
    """A group of `workers` ranks, each with `threads` CPUs and `gpus` GPUs."""

    workers: int
    threads: int
    gpus: float = 0.0
    placement: Placement = "pack"

    def scaling_config(self) -> "ScalingConfig":
        """Ray Train's: one placement group with a bundle a rank, in the strategy of `placement`."""
        from ray.train import ScalingConfig

        resources = {"CPU": float(self.threads)} | ({"GPU": self.gpus} if self.gpus else {})
        return ScalingConfig(
            num_workers=self.workers,
            use_gpu=self.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=self.placement.upper(),
        )
