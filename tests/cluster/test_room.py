"""Whether roles find room: now, by the autoscaler, or which bundle lacks what; Ray Train's group counts with ours."""

from dataclasses import replace

import pytest

from cluster.packing import Bundle, Room
from cluster.room import NodeGroup, check_room, could_be_freed, pending, spoken

LEARNERS = [Bundle("learner", 4, 1)] * 2
GENERATORS = [Bundle("generator", 2, 1)] * 2
ALL = [*LEARNERS, *GENERATORS, Bundle("scoring", 1)]


def node(name: str, cpus: float, gpus: float, total_cpus: float | None = None, total_gpus: float | None = None) -> Room:
    return Room(name, cpus, gpus, total_cpus or cpus, total_gpus or gpus)


def test_all_that_fits_at_once_is_ok():
    found = check_room(ALL, [node("a", 8, 2), node("b", 8, 2)], None)
    assert found.state == "ok"
    assert found.says.startswith(
        "2 learner (4 CPUs and 1 GPU each), 2 generator (2 CPUs and 1 GPU each), 1 scoring (1 CPU)"
    )


def test_roles_that_each_fit_alone_and_would_wait_for_each_other_fail():
    nodes = [node("a", 8, 2)]
    assert check_room(LEARNERS, nodes, None).state == "ok"
    assert check_room(GENERATORS, nodes, None).state == "ok"
    found = check_room([*LEARNERS, *GENERATORS], nodes, None)
    assert found.state == "failed"
    assert "2 generator (2 CPUs and 1 GPU each): no room beside the other roles" in found.says


@pytest.mark.parametrize(
    ("rooms", "says"),
    [
        ([], "2 learner (4 CPUs and 1 GPU each): there is no node"),
        (
            [node("a", 2, 8), node("b", 64, 0)],
            "2 learner (4 CPUs and 1 GPU each): no node is that large; a comes nearest with 2 CPUs and 8 GPUs in all",
        ),
        (
            [node("a", 3, 1, 8, 2)],
            "2 learner (4 CPUs and 1 GPU each): none has that free; a comes nearest with 3 CPUs and 1 GPU free",
        ),
    ],
)
def test_what_lacks_what_is_told(rooms, says):
    found = check_room(LEARNERS, rooms, None)
    assert (found.state, found.says) == ("failed", says)


def test_what_an_autoscaler_can_add_is_unknown_until_scaled_and_what_it_cannot_fails():
    group = NodeGroup("gpu", 8, 1, at_most=4)
    found = check_room(LEARNERS, [node("head", 2, 0)], [group])
    assert (found.state, found.says[:21]) == ("unknown", "unknown until scaled:")
    for short in (NodeGroup("gpu", 8, 1, at_most=1), NodeGroup("small", 2, 1, at_most=None)):
        found = check_room(LEARNERS, [node("head", 2, 0)], [short])
        assert found.state == "failed"
        assert found.says.endswith("and what the autoscaler may add does not do")
    assert check_room(LEARNERS, [], [NodeGroup("gpu", 8, 1, at_most=None)]).state == "unknown"


def test_a_search_that_is_cut_short_is_unknown(monkeypatch):
    monkeypatch.setattr("cluster.packing.STEPS", 2)
    asked = [Bundle("a", cpus) for cpus in (5, 4, 4, 3, 2, 2)]
    assert check_room(asked, [node("x", 10, 0), node("y", 10, 0)], None).state == "unknown"


def test_bundles_are_counted_for_a_person():
    assert spoken([Bundle("scoring", 1, 0.5)] * 2) == "2 scoring (1 CPU and 0.5 GPU each)"


def test_learners_that_must_be_on_one_node_are_told_as_such():
    asked = [Bundle("learner", 1, 1, processes=4)]
    nodes = [node("a", 8, 2), node("b", 8, 2)]
    assert check_room([Bundle("learner", 1, 1)] * 4, nodes, None).state == "ok"
    found = check_room(asked, nodes, None)
    assert (found.state, found.says) == (
        "failed",
        "4 learner (1 CPU and 1 GPU each, all on one node): no node is that large; a comes nearest with 8 CPUs and 2 "
        "GPUs in all",
    )


def test_an_autoscaler_that_does_not_say_what_it_may_add_leaves_it_open():
    found = check_room(LEARNERS, [node("head", 2, 0)], [])
    assert (found.state, found.says) == (
        "unknown",
        "unknown until scaled: 2 learner (4 CPUs and 1 GPU each) wait for nodes to be added",
    )


def test_room_that_others_take_is_told_from_room_that_never_is():
    busy = [node("a", 1, 0, 8, 2)]
    assert could_be_freed(LEARNERS, busy)
    assert not could_be_freed(ALL, busy)
    assert pending(LEARNERS, [node("a", 4, 1)]) == "1 learner (4 CPUs and 1 GPU)"


def test_a_bundle_fits_on_nodes_with_its_labels_alone_and_which_it_lacks_is_told():
    pool = frozenset({("pool", "a")})
    learners = [Bundle("learner", 4, 1, labels=pool)] * 2
    spot, own = node("spot", 64, 8), replace(node("own", 8, 2), labels=pool | {("zone", "b")})
    assert check_room(learners, [spot, own], None).state == "ok"
    assert check_room([*learners, Bundle("scoring", 1)], [spot, own], None).state == "ok"
    found = check_room(learners, [spot], None)
    assert (found.state, found.says) == (
        "failed",
        "2 learner (4 CPUs and 1 GPU each on nodes with pool=a): there is no such node",
    )
    small = check_room(learners, [spot, replace(own, cpus=2, total_cpus=2)], None)
    assert small.says.endswith("no node is that large; own comes nearest with 2 CPUs and 2 GPUs in all")
    assert not could_be_freed(learners, [spot])
    assert could_be_freed(learners, [replace(own, cpus=0)])
    # What labels an autoscaler's nodes would have it does not say.
    assert check_room(learners, [spot], [NodeGroup("gpu", 8, 2, at_most=1)]).state == "unknown"
