"""Whether bundles of CPUs and GPUs fit onto nodes, all of them at once.

A bundle lies on one node. A fraction of a GPU lies on one GPU, whole ones take GPUs that nobody shares, as Ray deals
them out. Ray places bundles as they come, so where bundles of several sizes fit in one way only, it may not find it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor

STEPS = 50_000
"""Placements that are tried before the question is left open. House default: a fraction of a second."""

_EPSILON = 1e-6  # Ray counts resources to four digits

Labels = frozenset[tuple[str, str]]
"""Ray's labels of a node, or those that a bundle asks a node for: keys and values."""


@dataclass(frozen=True)
class Bundle:
    """What one process of a role reserves, or each of several processes that must lie on one node together."""

    role: str
    cpus: float
    gpus: float = 0.0
    processes: int = 1
    labels: Labels = frozenset()
    """Those that its node must have."""

    @property
    def all_cpus(self) -> float:
        """Of all its processes."""
        return self.processes * self.cpus

    @property
    def all_gpus(self) -> float:
        """Of all its processes."""
        return self.processes * self.gpus


@dataclass(frozen=True)
class Room:
    """What a node has free, and in all."""

    node: str
    cpus: float
    gpus: float = 0.0
    total_cpus: float = 0.0
    total_gpus: float = 0.0
    labels: Labels | None = frozenset()
    """None where they are not known, and may be any."""

    def empty(self) -> "Room":
        """The same node with nothing on it."""
        return replace(self, cpus=self.total_cpus, gpus=self.total_gpus)

    def is_meant_by(self, bundle: Bundle) -> bool:
        """Whether it has the labels that the bundle asks for."""
        return _has(self.labels, bundle.labels)


@dataclass(frozen=True)
class Packing:
    """Where each bundle fits, by its position: the name of a node. `left` are the positions of those that do not fit
    beside the others; `is_certain` is False where the search was cut short, and there may be a way."""

    places: dict[int, str]
    left: tuple[int, ...] = ()
    is_certain: bool = True


def pack(bundles: Sequence[Bundle], rooms: Sequence[Room]) -> Packing:
    """A way to place all bundles, if there is one; else the way of first fit, largest bundles first."""
    order = sorted(
        range(len(bundles)), key=lambda at: (-bundles[at].all_gpus, -bundles[at].all_cpus, bundles[at].role, at)
    )
    asked = frozenset[tuple[str, str]]().union(*(bundle.labels for bundle in bundles))
    free = [_free(room, asked) for room in rooms]
    first = _first_fit(bundles, order, rooms, free)
    if not first.left or _never(bundles, rooms):
        return first
    search = _Search([bundles[at] for at in order], free)
    found = search.place(0, free, -1)
    if found is None:
        return Packing(first.places, first.left, is_certain=search.steps < STEPS)
    return Packing({at: rooms[index].node for at, index in zip(order, found, strict=True)})


def places_of_processes(bundles: Sequence[Bundle], packing: Packing) -> dict[int, str]:
    """The node of each process, by its position where the processes of all bundles are counted one after another."""
    found: dict[int, str] = {}
    number = 0
    for at, bundle in enumerate(bundles):
        for process in range(number, number + bundle.processes):
            if at in packing.places:
                found[process] = packing.places[at]
        number += bundle.processes
    return found


def nearest(bundle: Bundle, rooms: Sequence[Room]) -> Room | None:
    """The node with its labels that lacks least of what the bundle needs; None without any."""
    meant = [room for room in rooms if room.is_meant_by(bundle)]
    if not meant:
        return None
    return min(meant, key=lambda room: (max(bundle.all_gpus - room.gpus, 0.0), max(bundle.all_cpus - room.cpus, 0.0)))


def fits(bundle: Bundle, room: Room) -> bool:
    """Whether the bundle alone fits onto what the node has free."""
    return _free(room, bundle.labels).less(bundle) is not None


@dataclass(frozen=True)
class _Free:
    """What is free of a node: CPUs, and of each of its GPUs, the fullest first; and its labels."""

    cpus: float
    gpus: tuple[float, ...]
    labels: Labels | None = frozenset()

    def less(self, bundle: Bundle) -> "_Free | None":
        """What is left with the bundle on it; None where it does not fit."""
        if not _has(self.labels, bundle.labels):
            return None
        if bundle.all_cpus > self.cpus + _EPSILON:
            return None
        gpus: tuple[float, ...] | None = self.gpus
        for _ in range(bundle.processes):
            gpus = _taken(gpus, bundle.gpus)
            if gpus is None:
                return None
        return _Free(self.cpus - bundle.all_cpus, gpus, self.labels)


def _free(room: Room, asked: Labels) -> _Free:
    """What is free of a node, with those of its labels that somebody asks for: by the others, of which Ray gives each
    node its own, nodes with equal room would differ."""
    return _Free(room.cpus, _instances(room.gpus), None if room.labels is None else room.labels & asked)


def _has(labels: Labels | None, asked: Labels) -> bool:
    return labels is None or asked <= labels


def _instances(gpus: float) -> tuple[float, ...]:
    whole = floor(gpus + _EPSILON)
    rest = gpus - whole
    return (*((rest,) if rest > _EPSILON else ()), *([1.0] * whole))


def _taken(free: tuple[float, ...], gpus: float) -> tuple[float, ...] | None:
    if gpus <= _EPSILON:
        return free
    left = list(free)
    if gpus < 1 - _EPSILON:
        # Best fit: the fullest GPU that still has the share, so that whole ones stay whole.
        at = next((at for at, share in enumerate(left) if share + _EPSILON >= gpus), None)
        if at is None:
            return None
        left[at] -= gpus
        return tuple(sorted(left))
    whole = round(gpus)
    if sum(share > 1 - _EPSILON for share in left) < whole:
        return None
    return tuple(left[: len(left) - whole])


def _first_fit(bundles: Sequence[Bundle], order: Sequence[int], rooms: Sequence[Room], free: list[_Free]) -> Packing:
    now = list(free)
    places: dict[int, str] = {}
    left: list[int] = []
    for at in order:
        for index, room in enumerate(rooms):
            rest = now[index].less(bundles[at])
            if rest is not None:
                now[index], places[at] = rest, room.node
                break
        else:
            left.append(at)
    return Packing(places, tuple(left))


def _never(bundles: Sequence[Bundle], rooms: Sequence[Room]) -> bool:
    """Whether it is plain that they do not fit: more is asked for than there is, or one fits onto no node."""
    return (
        sum(bundle.all_cpus for bundle in bundles) > sum(room.cpus for room in rooms) + _EPSILON
        or sum(bundle.all_gpus for bundle in bundles) > sum(room.gpus for room in rooms) + _EPSILON
        or any(not any(fits(bundle, room) for room in rooms) for bundle in set(bundles))
    )


class _Search:
    """Tries all ways, largest bundles first. Equal bundles go onto nodes in their order, and of nodes that have equal
    room the first is tried, because exchanging equals makes no new way."""

    def __init__(self, bundles: list[Bundle], free: list[_Free]) -> None:
        self._bundles = bundles
        self._nodes = len(free)
        self.steps = 0

    def place(self, number: int, free: list[_Free], last: int) -> list[int] | None:
        if number == len(self._bundles):
            return []
        bundle = self._bundles[number]
        is_like_the_last = number > 0 and _same(bundle, self._bundles[number - 1])
        tried: set[_Free] = set()
        for index in range(last if is_like_the_last else 0, self._nodes):
            rest = free[index].less(bundle)
            if rest is None or free[index] in tried:
                continue
            self.steps += 1
            if self.steps >= STEPS:
                return None
            tried.add(free[index])
            following = self.place(number + 1, [*free[:index], rest, *free[index + 1 :]], index)
            if following is not None:
                return [index, *following]
        return None


def _same(one: Bundle, other: Bundle) -> bool:
    return (one.cpus, one.gpus, one.processes, one.labels) == (other.cpus, other.gpus, other.processes, other.labels)
