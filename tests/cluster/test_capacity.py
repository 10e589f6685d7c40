"""What a cluster says of itself: nodes that live, and whether an autoscaler adds some."""

import json
from types import SimpleNamespace

import pytest

from cluster.capacity import groups_of, has_autoscaler, rooms_of
from cluster.packing import Room
from cluster.room import NodeGroup


def node(number: str, host: str, alive: bool = True, **resources: float) -> dict:
    labels = {"ray.io/node-id": number}
    return {"NodeID": number, "NodeManagerHostname": host, "Alive": alive, "Resources": resources, "Labels": labels}


def test_nodes_that_live_are_called_by_their_host_and_by_their_id_where_hosts_are_one():
    nodes = [node("a" * 8, "one", CPU=8.0, GPU=2.0), node("b" * 8, "two", CPU=4.0), node("c" * 8, "gone", False)]
    found = rooms_of(nodes, {"a" * 8: {"CPU": 3.0}, "b" * 8: {"CPU": 4.0}})
    a, b = (frozenset({("ray.io/node-id", 8 * each)}) for each in "ab")
    assert list(found.values()) == [Room("one", 3, 0, 8, 2, a), Room("two", 4, 0, 4, 0, b)]
    twice = rooms_of([node("a" * 8, "one", CPU=1.0), node("b" * 8, "one", CPU=1.0)], {})
    assert [room.node for room in twice.values()] == ["one/aaaaaa", "one/bbbbbb"]


@pytest.mark.parametrize(
    ("status", "version", "is_there"),
    [
        (None, 0, False),
        (None, 3, True),
        ({"autoscaler_report": {"active_nodes": {"node_4f1a": 1}}}, 0, False),
        ({"autoscaler_report": {"active_nodes": {"node_4f1a": 1, "gpu-group": 2}}}, 0, True),
        ({"load_metrics_report": {}}, 0, False),
        ("not a report", 0, False),
    ],
)
def test_an_autoscaler_is_told_from_one_that_only_reports(status, version, is_there):
    assert has_autoscaler(None if status is None else json.dumps(status).encode(), version) is is_there
    assert groups_of(None, is_there) == (() if is_there else None)


def test_groups_are_read_from_the_clusters_configuration():
    group = SimpleNamespace(name="gpu", resources={"CPU": 8, "GPU": 1}, max_count=-1)
    found = groups_of(SimpleNamespace(node_group_configs=[group]), True)
    assert found == (NodeGroup("gpu", 8.0, 1.0, None),)
