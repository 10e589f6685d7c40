"""How a recipe's roles are packed into pods: one worker group a role, as many pods of it as its processes need.

Learners are packed, as many ranks to a pod as a node has devices; a generator has a pod of its own, so that one can be
lost without the others; scoring processes have one each. A group's pods have Ray labels, which its role asks for:
without them Ray places a role wherever its bundle fits, learners on spot nodes too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.memory import GIB
from cluster.plan import Plan, RolePlan, Share, Shares
from serving.settings import ServingSettings

NODE_BYTES_OF_A_GPU_PROCESS = 4 * GIB
"""Memory of its node that a process on a GPU takes for libraries and pinned buffers. An assumption."""

SPARE = 1.25
"""Memory of a pod over what its processes are reckoned to need."""

OBJECTS = 2
"""Snapshots of the weights in a pod's object store at a time: the one that is loaded, and the one before it."""

LEARNERS_OBJECTS = 5
"""The same of a learners' pod, where conductor and weight store lie too: the last two, which the weight store keeps,
the newest, which it takes before it drops the oldest, and what learner and conductor hand on."""

SHARED_BYTES_OF_A_GPU_PROCESS = GIB
"""Of /dev/shm, beside Ray's object store, for each process on a GPU: the rings of NCCL and of vLLM's engines between
their processes. NVIDIA's guide to NCCL gives containers this much (--shm-size=1g)."""

LEAST_OBJECT_STORE_BYTES = 2 * GIB
LEAST_POD_BYTES = 4 * GIB


@dataclass(frozen=True)
class WorkerGroup:
    """Pods of one kind. `ray_cpus` are what Ray may hand out there; the container has one more, for Ray itself."""

    name: str
    pods: int
    most_pods: int
    ray_cpus: int
    gpus: int
    memory_gib: int
    object_store_gib: int
    is_spot_allowed: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's, of its pods."""

    @property
    def cpus(self) -> int:
        """Cores of the container."""
        return self.ray_cpus + 1

    @property
    def shared_memory_gib(self) -> int:
        """Size of /dev/shm: Ray's object store, and what processes on its GPUs share; without any, room that Ray wants
        to see free."""
        return self.object_store_gib + _shared_gib(self.gpus)


def _shared_gib(gpus: int) -> int:
    return max(1, gpus) * SHARED_BYTES_OF_A_GPU_PROCESS // GIB


def worker_groups(plan: Plan, shares: Shares, devices_per_node: int, most_generators: int) -> list[WorkerGroup]:
    """The groups of a training cluster: learners, generators, scoring. `most_generators` is how far the run may be
    scaled out."""
    roles = {role.role: role for role in plan.roles}
    snapshot = roles["generators"].memory_bytes["weights"]
    scoring = [share for share in (shares.scorers, shares.references) if share is not None]
    largest = max(
        (role for role in plan.roles if role.role not in ("learners", "generators")),
        key=lambda role: role.memory_total_bytes,
    )
    ranks = _ranks_in_a_pod(shares.learners, devices_per_node)
    return [
        # Ray Train's controller and the run's other actors ask for nothing; one CPU more lets none of them wait.
        _group("learners", shares.learners, ranks, roles["learners"], snapshot, spare_cpus=1, objects=LEARNERS_OBJECTS),
        _group("generators", shares.generators, 1, roles["generators"], snapshot, most=most_generators, is_spot=True),
        _group(
            "scoring", Share(sum(s.processes for s in scoring), scoring[0].cpus, scoring[0].gpus), 1, largest, snapshot
        ),
    ]


def _ranks_in_a_pod(learners: Share, devices_per_node: int) -> int:
    """The most ranks that divide the group evenly and fit one node's devices."""
    room = max(1, int(devices_per_node / learners.devices))
    return max(ranks for ranks in range(1, min(room, learners.processes) + 1) if learners.processes % ranks == 0)


def _group(
    name: str,
    share: Share,
    in_a_pod: int,
    role: RolePlan,
    snapshot_bytes: int,
    spare_cpus: int = 0,
    most: int = 0,
    is_spot: bool = False,
    objects: int = OBJECTS,
) -> WorkerGroup:
    pods = -(-share.processes // in_a_pod)
    store = max(LEAST_OBJECT_STORE_BYTES, objects * snapshot_bytes)
    needs = in_a_pod * _node_bytes(share, role)
    gpus = math.ceil(in_a_pod * share.gpus)
    return WorkerGroup(
        name=name,
        pods=pods,
        most_pods=max(pods, most),
        ray_cpus=in_a_pod * share.cpus + spare_cpus,
        gpus=gpus,
        memory_gib=math.ceil(max(LEAST_POD_BYTES, SPARE * needs + store) / GIB) + _shared_gib(gpus),
        object_store_gib=math.ceil(store / GIB),
        is_spot_allowed=is_spot,
    )


def _node_bytes(share: Share, role: RolePlan) -> int:
    """Memory of the node that one process takes: all of it without a GPU, else what lies beside the device."""
    if share.gpus == 0:
        return role.memory_total_bytes
    return share.system_processes * NODE_BYTES_OF_A_GPU_PROCESS + role.node_memory_bytes


def serving_group(plan: Plan, serving: ServingSettings, reward: Share) -> WorkerGroup:
    """The pods of the live endpoint: one a replica, as many as there may be, since no autoscaler adds any. One more
    CPU, and what a scoring process has of a GPU, are for the reward model beside the engines."""
    scores_gpus = reward.gpus if serving.score else 0.0
    engines = serving.engines
    if serving.gpus > 0:
        needs = engines * NODE_BYTES_OF_A_GPU_PROCESS
    else:
        needs = max(engines * plan.serving.engine_bytes, int(serving.memory_budget_gib * GIB))
    gpus = math.ceil(serving.gpus + scores_gpus)
    return WorkerGroup(
        name="serving",
        pods=serving.max_replicas,
        most_pods=serving.max_replicas,
        ray_cpus=serving.threads * engines + 1,
        gpus=gpus,
        memory_gib=math.ceil(max(LEAST_POD_BYTES, SPARE * needs + LEAST_OBJECT_STORE_BYTES) / GIB) + _shared_gib(gpus),
        object_store_gib=math.ceil(LEAST_OBJECT_STORE_BYTES / GIB),
    )
