"""Whether a recipe's roles find room on a cluster: now, once its autoscaler has added nodes, or not at all.

All roles are counted together, Ray Train's own placement group with our placement groups and actors: each alone may
fit, and then they wait for each other. Nothing is reserved here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bundles import bundle_of, spoken_bundle, spoken_labels
from cluster.checks import Finding
from cluster.packing import Bundle, Room, fits, nearest, pack


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that an autoscaler may add: their name, what each has, and how many there may be (None: no limit)."""

    name: str
    cpus: float
    gpus: float
    at_most: int | None


MOST_ADDED = 1000
"""Nodes of a group without a limit that are reckoned with."""


def check_room(bundles: Sequence[Bundle], rooms: Sequence[Room], groups: Sequence[NodeGroup] | None) -> Finding:
    """Whether all bundles fit at once. `groups` are the autoscaler's: None where there is none, empty where it does not
    say what it may add.

    `ok`: now. `unknown`: once the autoscaler has added nodes. `failed`: which bundle lacks what, and where.
    """
    now = pack(bundles, rooms)
    if not now.left:
        return Finding("placement", "ok", f"{spoken(bundles)}: all fit now")
    if not now.is_certain:
        return Finding(
            "placement", "unknown", f"{spoken(bundles)}: no way to place all of them was found in the time for it"
        )
    if groups is not None:
        scaled = [*(room.empty() for room in rooms), *_added(bundles, groups)]
        if not groups or not pack(bundles, scaled).left:
            lacking = spoken([bundles[at] for at in now.left])
            return Finding("placement", "unknown", f"unknown until scaled: {lacking} wait for nodes to be added")
    return Finding("placement", "failed", "; ".join(_lacks(bundles, now.left, rooms, groups or ())))


def spoken(bundles: Sequence[Bundle]) -> str:
    """Bundles for a person: "2 learner (1 CPU each), 1 scoring (1 CPU and 0.5 GPU)"."""
    said = []
    for bundle, count in Counter(bundles).items():
        number = count * bundle.processes
        each = spoken_bundle(bundle_of(bundle.cpus, bundle.gpus)) + (" each" if number > 1 else "")
        together = ", all on one node" if bundle.processes > 1 else ""
        said.append(f"{number} {bundle.role} ({each}{together}{spoken_labels(dict(bundle.labels))})")
    return ", ".join(said)


def _added(bundles: Sequence[Bundle], groups: Sequence[NodeGroup]) -> list[Room]:
    """Nodes that the autoscaler could add; more of a group than there are bundles would stay empty."""
    most = min(len(bundles), MOST_ADDED)
    return [
        Room(f"{group.name} {number}", group.cpus, group.gpus, group.cpus, group.gpus, labels=None)
        for group in groups
        for number in range(most if group.at_most is None else min(group.at_most, most))
    ]


def _lacks(
    bundles: Sequence[Bundle], left: Sequence[int], rooms: Sequence[Room], groups: Sequence[NodeGroup]
) -> list[str]:
    """One sentence for each kind of bundle that finds no room."""
    told: dict[Bundle, str] = {}
    empty = [room.empty() for room in rooms]
    for bundle, count in Counter(bundles[at] for at in left).items():
        asks = spoken([bundle] * count)
        closest = nearest(bundle, rooms)
        if closest is None:
            told[bundle] = f"{asks}: there is no {'such ' if rooms else ''}node"
        elif not any(fits(bundle, room) for room in empty):
            large = nearest(bundle, empty)
            assert large is not None
            told[bundle] = f"{asks}: no node is that large; {large.node} comes nearest with {_has(large)} in all"
        elif not any(fits(bundle, room) for room in rooms):
            told[bundle] = f"{asks}: none has that free; {closest.node} comes nearest with {_has(closest)} free"
        else:
            told[bundle] = (
                f"{asks}: no room beside the other roles, which take what {closest.node} and others have free"
            )
        if groups:
            told[bundle] += ", and what the autoscaler may add does not do"
    return list(told.values())


def _has(room: Room) -> str:
    return f"{room.cpus:g} CPU{'' if room.cpus == 1 else 's'} and {room.gpus:g} GPU{'' if room.gpus == 1 else 's'}"


def could_be_freed(bundles: Sequence[Bundle], rooms: Sequence[Room]) -> bool:
    """Whether all would fit if nothing else ran on the nodes."""
    return not pack(bundles, [room.empty() for room in rooms]).left


def pending(bundles: Sequence[Bundle], rooms: Sequence[Room]) -> str:
    """The bundles that find no room now, for a person."""
    return spoken([bundles[at] for at in pack(bundles, rooms).left])
