"""Where Ray really puts the roles of a recipe on three nodes with declared GPUs, against what `cluster.packing` and
`cluster.room` say beforehand."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from amenable.crew import Crew
from amenable.doctor import bundles_of
from amenable.progress import Progress
from amenable.recipe import Recipe
from cluster.bundles import bundle_of
from cluster.packing import Bundle, Room, pack
from cluster.placement import OwnPlacementGroup
from cluster.room import check_room
from learners.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NODES = {"a": (4, 4), "b": (4, 4), "c": (3, 1)}
"""CPUs and GPUs that each is started with; this machine has none of the latter."""

LABELS = {"a": {"pool": "one"}, "b": {"pool": "two", "zone": "west"}, "c": {}}
"""Ray labels that each is started with."""
GIVEN = {label for labels in LABELS.values() for label in labels.items()}

STARTS = 3
LIMIT_S = 120.0
NEVER_S = 3.0
"""After which room that has not come is taken not to come; that which comes takes less than one."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The cluster; names of NODES by Ray's ids."""
    from cluster.session import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # processes that nothing here would use
        nodes, names = begun()
        try:
            with session(nodes.address, cpus=1):
                yield names
        finally:
            nodes.shutdown()


def begun() -> tuple[Any, dict[str, str]]:
    """Ray gives a node's processes 30 s, which is short on a machine that is busy; so it is tried more than once."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(STARTS)):
        nodes = Cluster()
        try:
            added = {
                nodes.add_node(
                    num_cpus=cpus, num_gpus=gpus, labels=dict(LABELS[name]), include_dashboard=False
                ).node_id: name
                for name, (cpus, gpus) in NODES.items()
            }
            return nodes, added
        except Exception as error:  # Ray raises a plain one
            nodes.shutdown()
            if "timed out during startup" not in str(error) or not left:
                raise
    raise AssertionError


@pytest.fixture(autouse=True)
def left_empty(cluster) -> Iterator[None]:
    """What a test reserves it gives back."""
    yield
    until(lambda: rooms(cluster) == declared(), "all of the nodes to be free again")


def until(holds: Callable[[], Any], what: str) -> Any:
    give_up = time.monotonic() + LIMIT_S
    while not (found := holds()):
        assert time.monotonic() < give_up, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.1)
    return found


def rooms(cluster: dict[str, str]) -> list[Room]:
    """As the doctor asks for them, by our names."""
    from cluster.doctor import capacity

    found = [(cluster[number], room) for number, room in capacity().rooms.items()]
    return sorted(
        (
            replace(room, node=name, labels=frozenset(each for each in room.labels or () if each in GIVEN))
            for name, room in found
        ),
        key=lambda room: room.node,
    )


def declared() -> list[Room]:
    return [Room(name, cpus, gpus, cpus, gpus, frozenset(LABELS[name].items())) for name, (cpus, gpus) in NODES.items()]


def recipe(tmp_path: Path, **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {"name": "placed", "run_directory": str(tmp_path / "run"), "ppo": {"batch_size": 480}, **settings}
    )


NUMBERS = count()
"""No two placement groups have one name."""

Placed = list[tuple[str, tuple[str, ...]]]
"""Of each process its node, and the numbers of the GPUs it may use there."""


def where_class() -> Any:
    import ray

    class Where:
        def where(self) -> tuple[str, tuple[str, ...]]:
            import ray

            context = ray.get_runtime_context()
            return context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ()))

    return ray.remote(Where)


def asked_where(actors: list[Any], cluster: dict[str, str]) -> Placed:
    import ray

    found = ray.get([actor.where.remote() for actor in actors], timeout=LIMIT_S)
    return [(cluster[node], gpus) for node, gpus in found]


@contextmanager
def learners(ranks: Ranks, tmp_path: Path, cluster: dict[str, str]) -> Iterator[Placed]:
    """A group of Ray Train's as a `LearnerGroup` asks for it, while the block lasts; with a train loop that only says
    where it is, because the GPUs are none."""
    from ray.train import RunConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    told, over = tmp_path / "told", tmp_path / "over"
    told.mkdir()

    def train(given: dict[str, str]) -> None:
        import time
        from pathlib import Path

        import ray

        context = ray.get_runtime_context()
        rank = ray.train.get_context().get_world_rank()
        gpus = ",".join(context.get_accelerator_ids().get("GPU", ()))
        (Path(given["told"]) / f"{rank}.new").write_text(f"{context.get_node_id()} {gpus}")
        (Path(given["told"]) / f"{rank}.new").rename(Path(given["told"]) / str(rank))
        give_up = time.monotonic() + 120
        while not Path(given["over"]).exists() and time.monotonic() < give_up:
            time.sleep(0.1)

    trainer = DataParallelTrainer(
        train,
        train_loop_config={"told": str(told), "over": str(over)},
        scaling_config=ranks.scaling_config(),
        run_config=RunConfig(name="placed", storage_path=str(tmp_path)),
    )
    fitting = threading.Thread(target=trainer.fit, daemon=True)
    fitting.start()
    try:
        files = [told / str(rank) for rank in range(ranks.workers)]
        until(lambda: all(file.exists() for file in files), "every rank to say where it is")
        lines = [file.read_text().split(" ") for file in files]
        yield [(cluster[node], tuple(filter(None, gpus.split(",")))) for node, gpus in lines]
    finally:
        over.touch()
        fitting.join(LIMIT_S)
        assert not fitting.is_alive()


@contextmanager
def generators(asked: Recipe, cluster: dict[str, str]) -> Iterator[Placed]:
    """Actors in the placement groups that generators have."""
    import ray

    rollouts, where = asked.rollouts, where_class()
    placement = OwnPlacementGroup(bundle_of(rollouts.threads, rollouts.gpus), rollouts.node_labels)
    reserved = [placement.reserve(f"generator-{number}") for number in range(rollouts.generators)]
    actors = [
        where.options(num_cpus=rollouts.threads, num_gpus=rollouts.gpus, **placement.options(room)).remote()
        for room in reserved
    ]
    try:
        yield asked_where(actors, cluster)
    finally:
        for actor, room in zip(actors, reserved, strict=True):
            ray.kill(actor)
            placement.release(room)


@contextmanager
def scoring(asked: Recipe, tmp_path: Path, cluster: dict[str, str]) -> Iterator[Placed]:
    """Actors with the options that the crew gives to scoring processes."""
    import ray

    spec = Crew(asked, tmp_path, Progress(json=True), None).scoring_spec()
    count = asked.scoring.scorers + (0 if asked.scoring.fused else asked.scoring.references)
    names = {"num_cpus", "num_gpus", "label_selector"}
    resources = {name: value for name, value in spec.options.items() if name in names}
    actors = [where_class().options(**resources).remote() for _ in range(count)]
    try:
        yield asked_where(actors, cluster)
    finally:
        for actor in actors:
            ray.kill(actor)


def single_actors(options: dict[str, Any], cluster: dict[str, str]) -> set[str]:
    """The nodes of eight actors that ask for no CPU, as the stream, the conductor and the weight store do."""
    import ray

    actors = [where_class().options(num_cpus=0, **options).remote() for _ in range(8)]
    try:
        return {name for name, _ in asked_where(actors, cluster)}
    finally:
        for actor in actors:
            ray.kill(actor)


@contextmanager
def taken(bundles: list[Bundle]) -> Iterator[list[bool]]:
    """Placement groups for `bundles`, one after another; whether Ray had room for each."""
    placement = [
        OwnPlacementGroup(bundle_of(bundle.all_cpus, bundle.all_gpus), dict(bundle.labels)) for bundle in bundles
    ]
    reserved = [each.reserve(f"taken-{next(NUMBERS)}") for each in placement]
    try:
        yield [each.wait(room, NEVER_S) for each, room in zip(placement, reserved, strict=True)]
    finally:
        for each, room in zip(placement, reserved, strict=True):
            each.release(room)


def held(bundles: list[Bundle], placed: Placed) -> dict[str, list[Bundle]]:
    """The bundles by the node that Ray has put them on."""
    found: dict[str, list[Bundle]] = {}
    for bundle, (node, _) in zip(bundles, placed, strict=True):
        found.setdefault(node, []).append(bundle)
    return found


def test_a_recipe_that_fills_the_nodes_is_placed_as_it_is_said_to_fit(cluster, tmp_path):
    asked = recipe(
        tmp_path,
        learners={"workers": 4, "gpus": 1},
        rollouts={"generators": 2, "tensor_parallel": 2, "gpus": 2, "threads": 2},
        scoring={"fused": False, "gpus": 0.5},
    )
    bundles = bundles_of(asked)
    assert check_room(bundles, rooms(cluster), None).state == "ok"
    ranks = Ranks(4, 1, 1.0, asked.learners.placement)
    with (
        learners(ranks, tmp_path, cluster) as learning,
        generators(asked, cluster) as generating,
        scoring(asked, tmp_path, cluster) as judging,
    ):
        left = rooms(cluster)
    # Learners are packed onto one node, of which each has a GPU of its own.
    assert len({node for node, _ in learning}) == 1
    assert sorted(gpus for _, gpus in learning) == [("0",), ("1",), ("2",), ("3",)]
    # A generator has all its GPUs on one node, and shares none.
    assert len({node for node, _ in generating}) == 1
    assert sorted(gpu for _, gpus in generating for gpu in gpus) == ["0", "1", "2", "3"]
    assert {len(gpus) for _, gpus in generating} == {2}
    # Halves of a GPU share one.
    assert judging == [("c", ("0",)), ("c", ("0",))]
    # What the nodes hold is what the arithmetic says they can hold, and what is left is what it says is left.
    placed = held(bundles, [*learning, *generating, *judging])
    full = {room.node: room for room in declared()}
    for node, there in placed.items():
        assert not pack(there, [full[node]]).left
        [room] = [room for room in left if room.node == node]
        assert room.gpus == full[node].gpus - sum(bundle.gpus for bundle in there) == 0
        assert room.cpus == full[node].cpus - sum(bundle.cpus for bundle in there)
    assert pack([Bundle("one more", 0, 0.25)], left).left


@pytest.mark.parametrize(
    ("learning_on", "others_on"), [("one", "two"), pytest.param("two", "one", marks=pytest.mark.extended)]
)
def test_every_role_lies_on_a_node_with_the_labels_that_it_asks_for(cluster, tmp_path, learning_on, others_on):
    """The same roles, which each of the nodes has room for: where they lie is what their labels say."""
    asked = recipe(
        tmp_path,
        learners={"workers": 2, "node_labels": {"pool": learning_on}},
        rollouts={"generators": 2, "node_labels": {"pool": others_on}},
        scoring={"node_labels": {"pool": others_on}},
    )
    node = {labels["pool"]: name for name, labels in LABELS.items() if labels}
    bundles = bundles_of(asked)
    assert check_room(bundles, rooms(cluster), None).state == "ok"
    told = pack(bundles, rooms(cluster)).places
    ranks = Crew(asked, tmp_path, Progress(json=True), None).ranks()
    with (
        learners(ranks, tmp_path, cluster) as learning,
        generators(asked, cluster) as generating,
        scoring(asked, tmp_path, cluster) as judging,
    ):
        assert {name for name, _ in learning} == {node[learning_on]}
        assert {name for name, _ in [*generating, *judging]} == {node[others_on]}
        assert single_actors(ranks.beside(), cluster) == {node[learning_on]}
        placed = [name for name, _ in [*learning, *generating, *judging]]
        assert placed == [told[at] for at in range(len(bundles))]


def test_learners_and_fused_scoring_with_fractions_share_the_one_gpu_of_a_small_node(cluster, tmp_path):
    shares = {"learners": {"gpus": 0.4}, "rollouts": {"gpus": 0.4}, "scoring": {"fused": True, "gpus": 0.2}}
    asked = recipe(tmp_path, **shares)
    others = [Bundle("somebody else", 4, 4)] * 2
    with taken(others) as had:
        assert had == [True, True]
        assert check_room(bundles_of(asked), rooms(cluster), None).state == "ok"
        with (
            learners(Ranks(1, 1, 0.4), tmp_path, cluster) as learning,
            generators(asked, cluster) as generating,
            scoring(asked, tmp_path, cluster) as judging,
        ):
            assert [*learning, *generating, *judging] == [("c", ("0",))] * 3
            assert check_room([Bundle("one more", 0, 0.1)], rooms(cluster), None).state == "failed"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"learners": {"gpus": 0}, "rollouts": {"generators": 3, "tensor_parallel": 3, "gpus": 3}},
            "1 generator (1 CPU and 3 GPUs): no room beside the other roles",  # nine GPUs for nine
        ),
        (
            {"rollouts": {"tensor_parallel": 8, "gpus": 8}},
            "1 generator (1 CPU and 8 GPUs): no node is that large",
        ),
        (
            {"learners": {"workers": 5, "gpus": 1, "placement": "strict_pack"}},
            "5 learner (1 CPU and 1 GPU each, all on one node): no node is that large",
        ),
        (
            {
                "learners": {"node_labels": {"pool": "one", "zone": "west"}},
                "rollouts": {"node_labels": {"pool": "three"}},
                "scoring": {"threads": 4, "node_labels": {"pool": "four"}},
            },
            "1 learner (1 CPU on nodes with pool=one, zone=west): there is no such node",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_told_before_anything_is_reserved_and_ray_has_no_room_for_it(
    cluster, tmp_path, settings, says
):
    import ray

    asked = recipe(tmp_path, **settings)
    groups = len(ray.util.placement_group_table())
    found = check_room(bundles_of(asked), rooms(cluster), None)
    assert found.state == "failed"
    assert says in found.says
    assert len(ray.util.placement_group_table()) == groups
    assert rooms(cluster) == declared()
    with taken(bundles_of(asked)) as had:
        assert not all(had)


def test_what_fits_after_some_was_taken_is_what_ray_has_room_for(cluster):
    """Prediction and Ray, question by question."""
    with taken([Bundle("somebody else", 1, 2), Bundle("somebody else", 1, 2)]) as had:
        assert had == [True, True]
        left = rooms(cluster)
        answers = set()
        for bundle in (Bundle("g", 1, 4), Bundle("g", 1, 3), Bundle("g", 2, 2), Bundle("g", 4, 1), Bundle("g", 3, 0.5)):
            fits = not pack([bundle], left).left
            with taken([bundle]) as [has]:
                assert has == fits, bundle
            answers.add(fits)
        assert answers == {True, False}
