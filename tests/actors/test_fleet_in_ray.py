"""Workers that are killed or stopped under a real conductor, stream and store: the run goes on, and loses nothing.

Generators are the real actors with a stand-in engine; the test is the learner.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import stand_in_engine
import torch

from actors.conductor import Conductor, Fellowship, Probe
from actors.desired import read_fleet, write_desired
from actors.failures import worker_broke
from actors.generator import RolloutGenerator, Work
from actors.pulse import pulse_now
from actors.recruits import Call, WorkerSpec
from actors.role_reports import report_now
from actors.settings import FleetSettings, RolloutSettings, SamplingSettings
from actors.stream import EpisodeStream, StreamPlan
from actors.weight_store import WeightStore
from cluster.bundles import bundle_of
from cluster.placement import OwnPlacementGroup
from corpus.problems import RunProblem
from corpus.schemas import make_table, write_table
from models.snapshot import pack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

WAIT_S = 120.0
BATCHES = 40
SETTINGS = FleetSettings(
    heartbeat_s=0.2, suspect_after_s=2.0, dead_after_s=6.0, start_deadline_s=90, minimum_deadline_s=100
)
PROBE = Probe([[1, 2, 3]], [[-2.0, -3.0]], 1e-3)


def generator_class(ray: Any) -> Any:
    """The real generator with a stand-in engine. Defined here, so that Ray takes it along by value."""
    ray.cloudpickle.register_pickle_by_value(stand_in_engine)
    plain: Any = RolloutGenerator.__ray_metadata__.modified_class  # pyright: ignore
    engine = stand_in_engine.StandInEngine

    class Playing(plain):
        def start(self) -> str:
            self._engine = engine()
            return self._name

        def finish_at_most(self, requests: int | None) -> None:
            self._engine.at_most = requests

        def room(self) -> str:
            group = ray.util.get_current_placement_group()
            return "" if group is None else group.id.hex()

    return ray.remote(num_cpus=0, max_concurrency=16, concurrency_groups={"health": 1})(Playing)


def scoring_class(ray: Any) -> Any:
    """Scorer and reference, which take their time."""

    class Scoring:
        def __init__(self, name: str) -> None:
            self.name, self.loaded, self.breaks = name, False, False

        def break_soon(self) -> None:
            self.breaks = True

        def load(self) -> None:
            self.loaded = True

        def score(self, episodes: Any) -> list[float]:
            assert self.loaded
            if self.breaks:
                raise worker_broke(self.name, "scored", RuntimeError("CUDA out of memory"))
            time.sleep(0.2)
            return [float(slot) for slot in episodes.column("slot").to_pylist()]

        def reference_logprobs(self, episodes: Any, temperature: float) -> list[list[float]]:
            return [[-1.0] for _ in range(episodes.num_rows)]

        @ray.method(concurrency_group="health")
        def heartbeat(self) -> Any:
            return pulse_now(0.0)

        def report(self) -> Any:
            return report_now(0.0, 0)

    return ray.remote(num_cpus=0, concurrency_groups={"health": 1})(Scoring)


def learner_class(ray: Any) -> Any:
    """A learner that publishes from a process of its own, which owns what it hands to the conductor."""

    class Learner:
        def heartbeat(self) -> Any:
            return pulse_now(0.0)

        def publish(self, conductor: Any, update: int) -> None:
            weights = torch.full((100_000,), float(update))  # more than Ray sends along with a call
            ray.get(conductor.publish.remote(0, update, pack({"weight": weights}, (0, update)), PROBE), timeout=WAIT_S)

    return ray.remote(num_cpus=0)(Learner)


class Stage:
    """A PPO stage whose learner is the test. With a `placement` every generator has room of its own."""

    def __init__(
        self,
        ray: Any,
        directory: Path,
        settings: FleetSettings,
        max_staleness: int = 0,
        placement: OwnPlacementGroup | None = None,
    ) -> None:
        self.ray, self.update, self.max_staleness = ray, 0, max_staleness
        self.directory = directory
        table = directory / "prompts.parquet"
        columns = {"prompt_id": ["p"], "user_id": ["u"], "prompt": ["?"], "prompt_tokens": [[1, 2]], "meta": [""]}
        write_table(make_table("prompts", columns), table, "prompts")
        plan = StreamPlan(
            prompts=str(table),
            directory=str(directory / "episodes"),
            seed=0,
            round_number=1,
            batch_size=8,
            chunk_size=2,
            max_staleness=max_staleness,
            batches=BATCHES,
            lease_s=600,
        )
        actors: tuple[Any, ...] = (EpisodeStream, WeightStore, Conductor)
        self.stream = actors[0].remote(plan)
        self.store = actors[1].remote(str(directory / "weights"))
        self.conductor = actors[2].remote(self.stream, self.store, 60.0, 60.0, settings, str(directory))
        rollouts = RolloutSettings(max_concurrent=8)
        generators = WorkerSpec(generator_class(ray), {}, (rollouts,), (Call("start"),), placement)
        scoring = WorkerSpec(scoring_class(ray), {}, (), (Call("load"),))
        names = ("generator-0", "generator-1")
        self.placement = placement
        self.rooms = {name: placement.reserve(name) for name in names} if placement is not None else {}
        self.generators = {name: generators.make(name, self.rooms.get(name)) for name in names}
        self.scoring = scoring.make("scoring-0")
        ray.get([each.start.remote() for each in self.generators.values()], timeout=WAIT_S)
        ray.get(self.scoring.load.remote(), timeout=WAIT_S)
        sampling = SamplingSettings(max_response_tokens=4)
        work = Work("r", 1, self.stream, self.conductor, [self.scoring], [self.scoring], sampling, 2, 4)
        fellowship = Fellowship(generators, scoring, None, self.rooms, 8)
        ray.get(self.conductor.begin.remote(self.generators, work, fellowship), timeout=WAIT_S)

    def pid(self, worker: Any) -> int:
        return self.ray.get(worker.heartbeat.remote(), timeout=WAIT_S).pid

    def publish(self) -> dict[str, float]:
        snapshot = pack({"weight": torch.full((3,), float(self.update))}, (0, self.update))
        found = self.ray.get(self.conductor.publish.remote(0, self.update, snapshot, PROBE), timeout=WAIT_S)
        if self.update == 0:
            self.ray.get(self.conductor.start_leasing.remote(), timeout=WAIT_S)
        return found.roles

    def train(self) -> list[str]:
        """One update's episodes: checks that they are whole; returns who generated them."""
        table = self.ray.get(self.stream.take.remote(self.update, WAIT_S, 0), timeout=WAIT_S)
        slots = list(range(8 * self.update, 8 * self.update + 8))
        assert table["slot"].to_pylist() == slots
        assert table["score"].to_pylist() == [float(slot) for slot in slots]
        oldest = min(spans[0]["update"] for spans in table["version_spans"].to_pylist())
        assert oldest >= self.update - self.max_staleness
        self.ray.get(self.stream.trained.remote(self.update, 0), timeout=WAIT_S)
        self.update += 1
        return table["generator"].to_pylist()

    def counts(self) -> dict[str, float]:
        return self.ray.get(self.stream.counts.remote(), timeout=WAIT_S)

    def waiting(self) -> float:
        """Episodes that are accepted and not trained on yet."""
        return self.counts()["stream/accepted_waiting"]

    def finish_at_most(self, requests: int | None, *names: str) -> None:
        calls = [self.generators[name].finish_at_most.remote(requests) for name in names]
        self.ray.get(calls, timeout=WAIT_S)

    def updates_until(self, holds: Any) -> dict[str, float]:
        """Trains on until the metrics of a publication are as they should be."""
        roles: dict[str, float] = {}
        while self.update < BATCHES:
            roles = self.publish()
            self.train()
            if holds(roles):
                return roles
            time.sleep(0.5)
        raise AssertionError(f"it did not come within {BATCHES} updates: {roles}")

    def close(self) -> None:
        for actor in (self.conductor, self.store, self.stream, self.scoring, *self.generators.values()):
            with suppress(Exception):
                self.ray.kill(actor)
        for room in self.rooms.values():
            self.placement.release(room)


@pytest.fixture
def stage(ray_session, tmp_path):
    made: list[Stage] = []

    def make(settings: FleetSettings = SETTINGS, **given: Any) -> Stage:
        made.append(Stage(ray_session, tmp_path, settings, **given))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(holds: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.1)


def workers(stage: Stage) -> dict[str, str]:
    """The state of each worker, as the conductor last wrote it."""
    found: Any = read_fleet(stage.directory) or {}
    return found.get("workers", dict.fromkeys(stage.generators, ""))


def rooms_of_generators(ray: Any) -> dict[str, str]:
    """The placement groups that there are, by Ray's id, and what they are called."""
    found = ray.util.placement_group_table()
    return {number: group["name"] for number, group in found.items() if group["state"] != "REMOVED"}


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def kill(stage: Stage, actor: Any) -> None:
    pid = stage.pid(actor)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), "a process that was killed to be gone")


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.extended), signal.SIGSTOP])
def test_a_generator_that_is_killed_or_stopped_is_replaced_and_the_run_goes_on(stage, how):
    each = stage()
    each.publish()
    each.train()
    pid = each.pid(each.generators["generator-1"])
    os.kill(pid, how)
    roles = each.updates_until(lambda roles: roles["fleet/restarts"] == 1 and roles["fleet/generators_serving"] == 2)
    assert roles["fleet/dead"] == 0
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, "a process that is stopped is killed too"
        time.sleep(0.1)
    for _ in range(4):
        each.publish()
        each.train()


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.extended)])
def test_what_a_scoring_process_had_in_hand_is_scored_by_the_one_in_its_place(stage, how):
    each = stage()
    each.publish()
    each.train()
    pid = each.pid(each.scoring)
    each.publish()
    time.sleep(0.3)  # it scores one chunk of four at a time, 0.2 s each
    assert each.waiting() < 8
    os.kill(pid, how)
    each.train()
    assert not is_alive(pid)
    roles = each.updates_until(lambda roles: roles["fleet/scorers_serving"] == 1)
    assert roles["fleet/restarts"] == 1


def test_a_scoring_process_that_breaks_is_replaced_and_its_chunks_are_scored_by_another(stage):
    each = stage()
    each.publish()
    each.train()
    each.ray.get(each.scoring.break_soon.remote(), timeout=WAIT_S)
    each.publish()
    each.train()
    roles = each.updates_until(lambda roles: roles["fleet/scorers_serving"] == 1)
    assert roles["fleet/restarts"] == 1
    _, why = read_fleet(each.directory)["lost"]
    assert why == "scoring-0 was given up: it failed while it scored: RuntimeError: CUDA out of memory."


def test_a_budget_that_is_spent_is_told_to_the_learner_in_a_sentence(stage):
    each = stage(SETTINGS.model_copy(update={"restarts": 0}))
    each.publish()
    os.kill(each.pid(each.generators["generator-0"]), signal.SIGKILL)
    with pytest.raises(RunProblem) as found:
        each.updates_until(lambda roles: False)
    told = str(getattr(found.value, "cause", found.value))
    assert told.startswith("generator-0 was lost (")
    assert told.endswith(
        "and the 0 restarts of a generator that 3600 s allow (fleet.restarts) are spent; the same command continues "
        "from what was last saved."
    )


def test_a_generator_that_is_retired_while_a_publication_comes_writes_nothing_that_is_too_old(stage):
    each = stage(max_staleness=1)
    each.publish()
    each.train()
    until(lambda: each.waiting() == 8, "the next update's episodes")
    each.finish_at_most(0, "generator-0", "generator-1")
    each.publish()
    until(lambda: each.counts()["stream/leased"] == 24, "both to lease their half")
    each.finish_at_most(None, "generator-0")
    each.finish_at_most(2, "generator-1")  # one chunk of the two that it leased: it has room for another
    until(lambda: each.waiting() == 14, "all but one chunk of the other")
    each.train()
    write_desired(each.directory, 0, 1, "a person", "now")
    until(lambda: "generator-1" not in workers(each), "it to leave")
    each.finish_at_most(0, "generator-0")
    roles = each.publish()  # the other is not given these weights
    assert roles["fleet/generators_serving"] == 1
    with pytest.raises(RunProblem, match=r"owed by generator-0 .*s ago\)") as owed:
        each.ray.get(each.stream.take.remote(3, 1.0, 0), timeout=WAIT_S)
    assert "generator-1" not in str(owed.value), "it was leased slots of the version"
    each.finish_at_most(None, "generator-0", "generator-1")
    for _ in range(3):
        writers = each.train()
        each.publish()
    assert set(writers) == {"generator-0"}


def test_generators_that_die_after_the_learner_serve_what_it_last_published_from_the_weight_store(stage):
    each = stage(max_staleness=1)
    each.publish()
    each.train()
    until(lambda: each.waiting() == 8, "the next update's episodes")
    each.finish_at_most(0, "generator-0", "generator-1")
    learner = learner_class(each.ray).remote()
    each.ray.get(learner.publish.remote(each.conductor, 1), timeout=WAIT_S)
    kill(each, learner)
    assert each.waiting() == 8
    for generator in each.generators.values():
        kill(each, generator)
    each.train()
    writers = each.train()  # under weights 1, of which these processes have been given none by a learner
    assert set(writers) <= {"generator-0.1", "generator-1.1"}
    assert each.ray.get(each.store.state.remote(), timeout=WAIT_S).held == [(0, 0), (0, 1)]


def test_every_generator_has_a_placement_group_of_its_own_which_goes_and_comes_with_it(stage):
    each = stage(placement=OwnPlacementGroup(bundle_of(1)))
    rooms = rooms_of_generators(each.ray)
    assert sorted(rooms.values()) == ["amenable-generator-0", "amenable-generator-1"]
    for name, generator in each.generators.items():
        assert rooms[each.ray.get(generator.room.remote(), timeout=WAIT_S)] == f"amenable-{name}"
    each.publish()
    write_desired(each.directory, 0, 1, "a person", "now")
    until(lambda: [*rooms_of_generators(each.ray).values()] == ["amenable-generator-0"], "one room to be given back")
    write_desired(each.directory, 1, 2, "a person", "now")
    until(lambda: workers(each).get("generator-2") == "healthy", "another generator to serve")
    assert sorted(rooms_of_generators(each.ray).values()) == ["amenable-generator-0", "amenable-generator-2"]
    each.ray.get(each.conductor.finish.remote(), timeout=WAIT_S)
    assert "generator-0" in each.ray.get(each.conductor.survivors.remote(), timeout=WAIT_S)
    until(lambda: [*rooms_of_generators(each.ray).values()] == ["amenable-generator-0"], "the other to be given back")
