"""What tests ask manifests for: the packaged demo, and a run on GPUs."""

from dataclasses import replace
from typing import Any

from cluster.manifests import RunManifests, render
from cluster.worker_groups import WorkerGroup

GROUPS = (
    WorkerGroup(
        "learners", 2, 2, ray_cpus=9, gpus=8, memory_gib=400, object_store_gib=6, labels={"amenable-role": "learners"}
    ),
    WorkerGroup("generators", 4, 6, ray_cpus=1, gpus=1, memory_gib=16, object_store_gib=6, is_spot_allowed=True),
    WorkerGroup("scoring", 2, 2, ray_cpus=1, gpus=1, memory_gib=12, object_store_gib=6),
)
ASKED = RunManifests(
    run="hh-8b",
    recipe="name: hh-8b\nppo:\n  updates: 3\n",
    recipe_hash="0123456789abcdef",
    image="registry.example/amenable@sha256:" + "0" * 64,
    run_directory="/shared/runs/hh-8b",
    claim="runs",
    groups=GROUPS,
    serving=WorkerGroup("serving", 3, 3, ray_cpus=3, gpus=1, memory_gib=20, object_store_gib=2),
    replicas=(1, 3),
    concurrent_requests=256,
    checkpoint_s=500.0,
    deadline_s=90_000,
)


def documents(**changes: Any) -> list[dict[str, Any]]:
    """The manifests of the run on GPUs, with other wishes where they are named."""
    return render(replace(ASKED, **changes))


def one(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The only document of that kind."""
    [document] = [each for each in found if each["kind"] == kind]
    return document
