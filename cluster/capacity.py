"""What a cluster's nodes have free, and whether an autoscaler may add some: asked of Ray, nothing is reserved."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.packing import Room
from cluster.room import NodeGroup

_READ_ONLY = "node_"
"""How the node types of an autoscaler begin that only reports (ray/autoscaler/_private/util.py)."""


@dataclass(frozen=True)
class Capacity:
    """The nodes that live, by Ray's id, and the groups that an autoscaler may add: None without an autoscaler, empty
    where there is one and it does not say what it may add."""

    rooms: Mapping[str, Room]
    groups: tuple[NodeGroup, ...] | None


def capacity_now() -> Capacity:
    """The capacity of the cluster that this process is a worker of. Asks Ray's own state, which a driver that is
    connected through Ray Client does not have: to be called in a task."""
    import ray
    from ray._private import state
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    address = ray.get_runtime_context().gcs_address
    version = get_cluster_status(address).stats.autoscaler_version
    return Capacity(
        rooms_of(ray.nodes(), state.available_resources_per_node()),
        groups_of(
            state.state.get_cluster_config(),
            has_autoscaler(_internal_kv_get(DEBUG_AUTOSCALING_STATUS), int(version or 0)),
        ),
    )


def rooms_of(nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]]) -> dict[str, Room]:
    """The rooms of the nodes that live, by Ray's id, from `ray.nodes()` and what each has free. A node is called by its
    host, and by its id too where several bear one name."""
    living = [node for node in nodes if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in living)
    found = {}
    for node in living:
        host, number = node["NodeManagerHostname"], node["NodeID"]
        total, free = node["Resources"], available.get(number, {})
        name = host if hosts[host] == 1 else f"{host}/{number[:6]}"
        found[number] = Room(
            name,
            free.get("CPU", 0.0),
            free.get("GPU", 0.0),
            total.get("CPU", 0.0),
            total.get("GPU", 0.0),
            frozenset(node["Labels"].items()),
        )
    return found


def has_autoscaler(status: bytes | None, version: int) -> bool:
    """Whether an autoscaler adds nodes: one of Ray's second kind counts its states (`version`), one of the first writes
    a `status`, which one that only reports on a cluster of fixed nodes does as well, under node types of its own."""
    if version > 0:
        return True
    if not status:
        return False
    try:
        types = json.loads(status)["autoscaler_report"]["active_nodes"]
    except (ValueError, KeyError, TypeError):
        return False
    return any(not name.startswith(_READ_ONLY) for name in types)


def groups_of(config: Any, is_there: bool) -> tuple[NodeGroup, ...] | None:
    """The groups in Ray's ClusterConfig, which only some providers give; none are known without."""
    if config is None:
        return () if is_there else None
    return tuple(
        NodeGroup(
            group.name,
            float(group.resources.get("CPU", 0)),
            float(group.resources.get("GPU", 0)),
            None if group.max_count < 0 else int(group.max_count),
        )
        for group in config.node_group_configs
    )
