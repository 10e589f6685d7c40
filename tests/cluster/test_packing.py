"""Bundles onto nodes: what is said to fit does fit, what is said not to does not, by trying everything."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import packing
from cluster.packing import Bundle, Packing, Room, fits, nearest, pack, places_of_processes

SHARES = [0.0, 0.25, 0.5, 1.0, 2.0]
POOL = frozenset({("pool", "a")})
bundles = st.lists(
    st.builds(
        Bundle,
        st.sampled_from(["learner", "generator", "scoring"]),
        st.integers(0, 3),
        st.sampled_from(SHARES),
        st.sampled_from([1, 1, 2]),
        st.sampled_from([frozenset(), frozenset(), POOL]),
    ),
    max_size=5,
)
rooms = st.integers(0, 3).flatmap(
    lambda count: st.tuples(
        *(
            st.builds(
                Room,
                st.just(f"n{at}"),
                st.integers(0, 4),
                st.integers(0, 2),
                labels=st.sampled_from([frozenset(), POOL, POOL | {("zone", "b")}, None]),
            )
            for at in range(count)
        )
    )
)


def holds(asked: list[Bundle], room: Room) -> bool:
    """Whether a node holds the bundles, by trying every GPU for every fraction."""
    if room.labels is not None and not all(bundle.labels <= room.labels for bundle in asked):
        return False
    asked = [each for each in asked for _ in range(each.processes)]
    if sum(bundle.cpus for bundle in asked) > room.cpus:
        return False
    whole = sum(bundle.gpus for bundle in asked if bundle.gpus >= 1)
    shared = int(room.gpus - whole)
    if shared < 0:
        return False
    fractions = [bundle.gpus for bundle in asked if 0 < bundle.gpus < 1]
    if not fractions:
        return True
    return any(
        all(sum(share for share, at in zip(fractions, where, strict=True) if at == gpu) <= 1 for gpu in range(shared))
        for where in product(range(shared), repeat=len(fractions))
    )


def is_possible(asked: list[Bundle], nodes: tuple[Room, ...]) -> bool:
    """By trying every node for every bundle."""
    return any(
        all(
            holds([bundle for bundle, at in zip(asked, where, strict=True) if at == index], node)
            for index, node in enumerate(nodes)
        )
        for where in product(range(len(nodes)), repeat=len(asked))
    )


@settings(deadline=None)
@given(bundles, rooms)
def test_all_are_placed_exactly_where_there_is_a_way_and_the_way_holds(asked, nodes):
    found = pack(asked, nodes)
    assert found.is_certain
    assert (not found.left) == is_possible(asked, nodes)
    assert set(found.places) | set(found.left) == set(range(len(asked)))
    assert not set(found.places) & set(found.left)
    for node in nodes:
        assert holds([asked[at] for at, name in found.places.items() if name == node.node], node)


@settings(deadline=None)
@given(bundles, rooms, st.integers(0, 4), st.integers(0, 2))
def test_another_node_never_takes_room_away(asked, nodes, cpus, gpus):
    if not pack(asked, nodes).left:
        assert not pack(asked, (*nodes, Room("more", cpus, gpus))).left


@settings(deadline=None)
@given(bundles, rooms)
def test_the_order_of_bundles_and_nodes_makes_no_difference(asked, nodes):
    assert bool(pack(asked, nodes).left) == bool(pack(asked[::-1], nodes[::-1]).left)


def test_what_first_fit_misses_is_found():
    asked = [Bundle("a", cpus) for cpus in (5, 4, 4, 3, 2, 2)]
    nodes = [Room("x", 10), Room("y", 10)]
    assert packing._first_fit(asked, range(6), nodes, [packing._Free(10, ()), packing._Free(10, ())]).left
    assert not pack(asked, nodes).left


def test_whole_gpus_are_not_shared_and_a_fraction_lies_on_one():
    assert pack([Bundle("g", 0, 0.6), Bundle("g", 0, 0.6)], [Room("n", 1, 1)]).left
    assert not pack([Bundle("g", 0, 0.6), Bundle("g", 0, 0.6)], [Room("n", 1, 2)]).left
    assert pack([Bundle("l", 0, 2), Bundle("g", 0, 0.5)], [Room("n", 1, 2)]).left == (1,)
    assert not fits(Bundle("g", 0, 0.75), Room("n", 1, 0.5))


def test_processes_that_must_be_together_find_one_node_or_none():
    nodes = [Room("x", 8, 2), Room("y", 8, 2)]
    assert not pack([Bundle("l", 1, 1)] * 3, nodes).left
    assert pack([Bundle("l", 1, 1, processes=3)], nodes).left == (0,)
    assert not pack([Bundle("l", 1, 0.5, processes=3)], nodes).left
    asked = [Bundle("g", 1, 2), Bundle("l", 1, 1, processes=2), Bundle("s", 1)]
    assert places_of_processes(asked, pack(asked, nodes)) == {0: "y", 1: "x", 2: "x", 3: "x"}
    asked = [Bundle("l", 1, 1, processes=3), Bundle("s", 1)]
    assert places_of_processes(asked, pack(asked, nodes)) == {3: "x"}


def test_a_question_that_takes_too_long_is_left_open(monkeypatch):
    monkeypatch.setattr(packing, "STEPS", 3)
    found = pack([Bundle("a", cpus) for cpus in (5, 4, 4, 3, 2, 2)], [Room("x", 10), Room("y", 10)])
    assert found.left
    assert not found.is_certain


def test_the_node_that_comes_nearest_lacks_least():
    nodes = [Room("cpu", 8), Room("gpu", 1, 1)]
    assert nearest(Bundle("l", 4, 1), nodes) == nodes[1]
    assert nearest(Bundle("l", 4), nodes) == nodes[0]
    assert nearest(Bundle("l", 4), []) is None
    assert pack([], []) == Packing({})


def test_labels_that_nobody_asks_for_make_no_search_longer():
    """Ray gives every node a label of its own. That ten empty nodes are equal is what ends this search."""
    sizes = [2 + number / 16 for number in range(11)]
    nodes = [Room(f"n{at}", 3, labels=frozenset({("ray.io/node-id", str(at)), *POOL})) for at in range(10)]
    found = pack([Bundle("a", size, labels=POOL) for size in sizes], nodes)
    assert len(found.left) == 1
    assert found.is_certain
