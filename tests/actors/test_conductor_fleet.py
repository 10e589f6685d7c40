"""The conductor among stand-ins: who is given up, how it comes back, and what the others do meanwhile."""

import asyncio
import re
import threading
import time

import pytest
from ray.exceptions import RayTaskError
from stand_in_cast import QUICK, SAMPLING, Cast, Generator, Scoring, Spec, held_out, snapshot, turns, until

from actors import stage_fleet
from actors.desired import read_desired, read_fleet, write_desired
from actors.failures import worker_broke
from actors.recruits import Call
from actors.worker_rows import read_workers
from corpus.problems import RunProblem, UsageProblem


def replaced(each: Cast, spec: Spec, name: str) -> Generator:
    """The generator that was made in the place of `name`."""
    return spec.made[name][-1]


class Room:
    """What generators are placed in: there once `comes` is set, for which `wait` waits up to `patience_s` seconds."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.asked, self.comes = threading.Event(), threading.Event()
        self.given_back: list[str] = []

    def reserve(self, name: str) -> str:
        return f"room of {name}"

    def wait(self, reserved: str, timeout_s: float) -> bool:
        self.asked.set()
        return self.comes.wait(self._patience_s)

    def release(self, reserved: str) -> None:
        self.given_back.append(reserved)

    def says(self) -> str:
        return "1 CPU"


def test_the_survivors_go_on_and_a_replacement_is_refit_before_it_serves(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        one, two = each.generators.values()
        gate = asyncio.Event()

        class Starting(Generator):
            async def start(self) -> None:
                await gate.wait()

        spec._make, spec.start = (lambda name: Starting()), (Call("start"),)
        two.dead = True
        await until(lambda: "two" in spec.made)
        assert each.stream.released == ["two"], "its leases are free before another takes its place"
        publication = await each.publish(1)
        assert one.loaded == ["0.0", "0.1"]
        assert publication.roles["fleet/generators_serving"] == 1
        assert publication.roles["fleet/restarts"] == 1
        again = replaced(each, spec, "two")
        await turns()
        assert not again.worked, "it has loaded nothing yet"
        gate.set()
        await until(lambda: again.worked)
        assert again.loaded == ["0.1"], "the weight store's newest"
        await each.publish(2)
        assert again.loaded == ["0.1", "0.2"]
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs={"generators": spec}, deadline_s=1.0)


def test_a_silent_generator_is_suspected_then_killed_and_replaced(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        each.generators["two"].silent = True
        await until(lambda: each.conductor._fleet.figures()["fleet/suspect"] == 1)
        assert each.killed == []
        await until(lambda: each.killed)
        assert each.killed == [each.generators["two"]]
        await until(lambda: "two" in spec.made and replaced(each, spec, "two").worked)

    play(scene, settings=QUICK, specs={"generators": spec})


def test_a_generator_that_answers_in_time_is_not_given_up(play):
    async def scene(each: Cast) -> None:
        await each.publish(0)
        two = each.generators["two"]
        two.silent = True
        await until(lambda: each.conductor._fleet.figures()["fleet/suspect"] == 1)
        await until(lambda: each.stream.suspended == ["two"])
        two.silent = False
        for roster in each.conductor._fleet.rosters():  # what was asked while it was silent is never answered here
            for member in roster.members.values():
                if member.listening is not None:
                    member.listening.cancel()
        await until(lambda: each.conductor._fleet.figures()["fleet/suspect"] == 0)
        assert each.conductor._fleet.figures()["fleet/generators_serving"] == 2
        await until(lambda: each.stream.suspended == [])
        assert each.killed == []

    play(scene, settings=QUICK.model_copy(update={"dead_after_s": 20.0}))


def test_an_engine_that_stands_still_is_given_up_though_its_process_answers(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].stalled_s = QUICK.stall_after_s + 1
        await until(lambda: each.killed)
        assert each.killed == [each.generators["one"]]

    play(scene, settings=QUICK, specs={"generators": spec})


def test_a_generator_delivers_under_weights_that_its_own_probe_agreed_with_whatever_others_do(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        right, wrong, slow = each.generators.values()
        slow.gate.clear()
        wrong.off = 0.5
        publishing = asyncio.ensure_future(each.publish(1))
        await until(lambda: right.confirmed == ["0.0", "0.1"])
        await turns()
        assert not publishing.done()
        slow.gate.set()
        await publishing
        assert slow.confirmed == ["0.0", "0.1"]
        assert wrong.loaded == ["0.0", "0.1"]
        assert wrong.confirmed == ["0.0"]
        assert each.killed == [wrong]
        await until(lambda: replaced(each, spec, "wrong").confirmed == ["0.1"])

    play(scene, settings=QUICK, specs={"generators": spec}, right=0.0, wrong=0.0, slow=0.0)


def test_without_any_generator_a_publication_waits_for_the_replacement(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        each.generators["only"].dead = True
        publication = await each.publish(1)
        again = replaced(each, spec, "only")
        assert again.loaded == ["0.1"]
        assert publication.probe_nats == 0.0
        assert each.stream.admitted == [(0, 0), (0, 1)]

    play(scene, settings=QUICK, specs={"generators": spec}, only=0.0)


def test_a_replacement_that_disagrees_as_the_one_before_it_ends_the_run(play):
    spec = Spec(lambda name: Generator(off=0.5))

    async def scene(each: Cast) -> None:
        await each.publish(0)
        assert each.killed == [each.generators["wrong"]]
        await until(lambda: each.stream.failures)
        assert re.search("^wrong holds weights 0.0 but scores the probe 0.5", str(each.stream.failures[0]))
        assert len(spec.made["wrong"]) == 1, "no budget is spent on it"

    play(scene, settings=QUICK, specs={"generators": spec}, right=0.0, wrong=0.5)


def test_a_replacement_that_agrees_serves_where_the_one_before_it_disagreed(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await until(lambda: each.conductor._fleet.figures()["fleet/generators_serving"] == 2)
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs={"generators": spec}, right=0.0, wrong=0.5)


def test_an_error_in_loading_that_nobody_foresaw_costs_a_restart_and_ends_the_run_where_it_comes_again(play):
    def make(name: str) -> Generator:
        generator = Generator()
        generator.broken = name == "two.1"
        return generator

    spec = Spec(make)

    async def scene(each: Cast) -> None:
        for generator in each.generators.values():
            generator.broken = True
        publishing = asyncio.ensure_future(each.publish(0))
        await until(lambda: "one" in spec.made and replaced(each, spec, "one").confirmed)
        await publishing
        await until(lambda: each.stream.failures)
        assert str(each.stream.failures[0]).startswith(
            "two could not load weights 0.0: RuntimeError: CUDA out of memory"
        )
        assert (len(spec.made["one"]), len(spec.made["two"])) == (1, 1)

    play(scene, settings=QUICK, specs={"generators": spec})


@pytest.mark.parametrize(
    "error",
    [
        RayTaskError("sample", "Traceback", RuntimeError("CUDA out of memory")),  # in the sampling itself
        worker_broke("one", "generated", RuntimeError("CUDA out of memory")),  # in the step of another request
    ],
)
def test_held_out_prompts_are_sampled_and_scored_by_others_where_a_worker_breaks(play, error):
    specs = {"generators": Spec(lambda name: Generator()), "scorers": Spec(lambda name: Scoring())}

    async def scene(each: Cast) -> None:
        await each.publish(0)
        assert next(iter(each.conductor._fleet.generators.serving)) == "one"
        each.generators["one"].breaks = error
        each.scoring.actor.breaks = worker_broke("scoring-0", "scored 2 responses", RuntimeError("CUDA out of memory"))
        found = await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING)
        assert found["reward"] == 1.5
        assert each.killed == [each.generators["one"], each.scoring.actor]
        _, told = each.conductor._fleet.scoring["scoring process"].lost
        assert told == (
            "scoring-0 was given up: it failed while it scored 2 responses: RuntimeError: CUDA out of memory."
        )
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs=specs)


def test_an_evaluation_that_every_worker_breaks_at_is_told_with_the_error(play):
    def make(name: str) -> Scoring:
        scoring = Scoring()
        scoring.breaks = worker_broke(name, "scored 2 responses", RuntimeError("CUDA out of memory"))
        return scoring

    async def scene(each: Cast) -> None:
        each.scoring.actor.breaks = make("scoring-0").breaks
        with pytest.raises(RunProblem, match=r"failed while it scored 2 responses: RuntimeError: CUDA out of memory"):
            await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING)
        assert len(each.killed) == 2

    play(scene, settings=QUICK, specs={"scorers": Spec(make)})


def test_a_start_that_fails_for_a_reason_that_nobody_foresaw_is_made_again_once(play):
    class Starting(Generator):
        def __init__(self, problem: Exception | None) -> None:
            super().__init__()
            self.problem = problem

        async def start(self) -> None:
            if self.problem is not None:
                raise self.problem

    starts = {
        "one.1": UsageProblem("vLLM cannot serve it", "model/vllm"),
        "two.1": MemoryError(),
        "two.2": MemoryError(),
    }
    spec = Spec(lambda name: Starting(starts.get(name)), Call("start"))

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].dead = True
        await until(lambda: len(spec.made.get("one", [])) == 2 and replaced(each, spec, "one").confirmed)
        assert each.stream.failures == []
        each.generators["two"].dead = True
        await until(lambda: each.stream.failures)
        assert str(each.stream.failures[0]) == "two could not be made: MemoryError"
        assert len(spec.made["two"]) == 2

    play(scene, settings=QUICK, specs={"generators": spec})


def test_a_spent_budget_ends_the_run_in_a_sentence(play):
    def make(name: str) -> Generator:
        generator = Generator()
        generator.dead = True
        return generator

    spec = Spec(make)

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].dead = True
        await until(lambda: each.stream.failures)
        assert re.search(
            r"^one was lost \(.*\), and the 2 restarts of a generator that 3600 s allow \(fleet.restarts\) are spent; "
            "the same command continues from what was last saved.$",
            str(each.stream.failures[0]),
        )
        assert len(spec.made["one"]) == 2

    play(scene, settings=QUICK.model_copy(update={"restarts": 2}), specs={"generators": spec})


def test_too_few_for_too_long_ends_the_run_in_a_sentence(play):
    class Slow(Generator):
        async def start(self) -> None:
            await asyncio.Event().wait()

    spec = Spec(lambda name: Slow(), Call("start"))
    settings = QUICK.model_copy(update={"minimum_deadline_s": 0.5, "min_generators": 2})

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].dead = True
        await until(lambda: each.stream.failures)
        assert re.search(
            "^Of at least 2 generators only 1 served for 1 s; one is restarting, two is healthy, scoring-0 is healthy; "
            "the same command",
            str(each.stream.failures[0]),
        )

    play(scene, settings=settings, specs={"generators": spec})


def test_a_scoring_process_that_died_is_made_again_with_what_it_scores_with_and_generators_hear_of_it(play):
    spec = Spec(lambda name: Scoring(), Call("load_reward", ("the reward",)))

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        each.scoring.actor.dead = True
        asked = asyncio.ensure_future(each.conductor.scoring_pools(""))
        await until(lambda: "scoring-0" in spec.made)
        pools = await asked
        [scorer] = [handle.actor for handle in pools.scorers]
        assert scorer is spec.made["scoring-0"][0]
        assert scorer.loaded == ["the reward"]
        assert pools.references == pools.scorers
        await turns()
        for generator in each.generators.values():
            assert generator.adjusted[-1][1].scorers == pools.scorers
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs={"scorers": spec})


def test_held_out_prompts_are_sampled_and_scored_by_others_where_one_dies(play):
    generators, scoring = Spec(lambda name: Generator()), Spec(lambda name: Scoring())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].dead = True
        each.scoring.actor.dead = True
        found = await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING)
        assert found["reward"] == 1.5

    play(scene, settings=QUICK, specs={"generators": generators, "scorers": scoring})


@pytest.fixture
def stage(tmp_path):
    return tmp_path


def test_generators_come_and_go_as_is_wished_and_shares_follow(play, stage):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        await turns()
        one = each.generators["generator-0"]
        assert one.adjusted[-1][0] == 16
        write_desired(stage, 0, 3, "a person", "now")
        await until(lambda: each.conductor._fleet.figures()["fleet/generators_serving"] == 3)
        second = spec.made["generator-1"][0]
        assert second.loaded == ["0.0"]
        assert second.worked
        assert one.adjusted[-1][0] == 6, "a third of 16, in whole chunks"
        await until(lambda: list((read_fleet(stage) or {}).get("workers", {})).count("generator-2") == 1)
        assert read_fleet(stage)["counter"] == 1

        write_desired(stage, 1, 1, "a person", "later")
        await until(lambda: len(each.killed) == 2)
        assert second.rested, "it came to the end of what it had in hand"
        assert sorted(each.stream.released) == ["generator-1", "generator-2"]
        assert one.adjusted[-1][0] == 16
        await each.publish(1)
        assert second.loaded == ["0.0"], "who is retired is given no weights"
        write_desired(stage, 2, 2, "a person", "again")
        await until(lambda: "generator-3" in spec.made)
        assert each.stream.failures == []

    play(
        scene,
        settings=QUICK,
        specs={"generators": spec},
        directory=str(stage),
        admissible=16,
        **{"generator-0": 0.0},
    )


def test_a_version_is_admitted_once_nothing_is_leased_to_a_generator_that_leaves_without_it(play, stage):
    async def scene(each: Cast) -> None:
        await each.publish(0)
        await each.conductor.start_leasing()
        leaving = each.generators["generator-1"]
        each.stream.gate.clear()
        write_desired(stage, 0, 1, "a person", "now")
        await until(lambda: each.stream.excluded)
        publishing = asyncio.ensure_future(each.publish(1))
        await until(lambda: each.generators["generator-0"].loaded == ["0.0", "0.1"])
        await turns()
        assert leaving.loaded == ["0.0"]
        assert not leaving.rested
        assert each.stream.admitted == [(0, 0)], "it would lease slots of the version that it has not got"
        each.stream.gate.set()
        await publishing
        await until(lambda: each.killed)
        assert leaving.rested
        assert each.stream.excluded == each.stream.released == ["generator-1"]
        assert each.stream.failures == []

    spec = Spec(lambda name: Generator())
    generators = {"generator-0": 0.0, "generator-1": 0.0}
    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage), **generators)


def test_who_leaves_while_another_leaves_is_waited_for_too(play, stage):
    gates = {name: asyncio.Event() for name in ("generator-1", "generator-2")}

    async def scene(each: Cast) -> None:
        async def exclude(holder: str) -> None:
            each.stream.excluded.append(holder)
            await gates[holder].wait()

        each.stream.exclude = exclude
        await each.publish(0)
        await each.conductor.start_leasing()
        write_desired(stage, 0, 2, "a person", "now")
        await until(lambda: each.stream.excluded == ["generator-2"])
        publishing = asyncio.ensure_future(each.publish(1))
        await until(lambda: each.generators["generator-1"].loaded == ["0.0", "0.1"])
        await turns()
        write_desired(stage, 1, 1, "a person", "later")
        await until(lambda: each.stream.excluded == ["generator-2", "generator-1"])
        gates["generator-2"].set()
        await turns()
        assert each.stream.admitted == [(0, 0)]
        gates["generator-1"].set()
        await publishing
        assert each.stream.admitted == [(0, 0), (0, 1)]
        assert each.stream.failures == []

    spec = Spec(lambda name: Generator())
    generators = {"generator-0": 0.0, "generator-1": 0.0, "generator-2": 0.0}
    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage), **generators)


def test_a_version_is_admitted_once_nothing_is_leased_to_a_generator_that_was_late_with_it(play):
    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["slow"].gate.clear()
        each.stream.gate.clear()
        publishing = asyncio.ensure_future(each.publish(1))
        await until(lambda: each.stream.released == ["slow"])
        await turns()
        assert each.stream.admitted == [(0, 0)]
        each.stream.gate.set()
        await publishing

    spec = Spec(lambda name: Generator())
    each = play(scene, specs={"generators": spec}, deadline_s=0.2, quick=0.0, slow=0.0)
    assert each.stream.admitted == [(0, 0), (0, 1)]


def test_a_generator_without_room_is_told_of_and_comes_when_there_is(play, stage):
    spec = Spec(lambda name: Generator())
    spec.placement = Room(patience_s=0.0)  # pyright: ignore

    async def scene(each: Cast) -> None:
        await each.publish(0)
        write_desired(stage, 0, 2, "a person", "now")
        told = "generator-1 waits for a bundle of 1 CPU, which the cluster has not free"
        await until(lambda: (read_fleet(stage) or {}).get("waiting") == [told])
        await each.publish(1)
        spec.placement.comes.set()
        await until(lambda: each.conductor._fleet.figures()["fleet/generators_serving"] == 2)
        await until(lambda: (read_fleet(stage) or {}).get("waiting") == [])
        write_desired(stage, 1, 1, "a person", "later")
        await until(lambda: spec.placement.given_back == ["room of generator-1"])

    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage), **{"generator-0": 0.0})


def test_room_that_comes_as_its_generator_is_retired_is_given_back(play, stage):
    spec = Spec(lambda name: Generator())
    spec.placement = Room(patience_s=30.0)  # pyright: ignore

    async def scene(each: Cast) -> None:
        await each.publish(0)
        write_desired(stage, 0, 2, "a person", "now")
        await until(spec.placement.asked.is_set)
        write_desired(stage, 1, 1, "a person", "at once")
        await until(lambda: (read_fleet(stage) or {}).get("counter") == 2)
        spec.placement.comes.set()
        await until(lambda: spec.placement.given_back == ["room of generator-1"])
        assert spec.made == {}

    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage), **{"generator-0": 0.0})


class Rooms:
    """Room for all but `without`. Remembers who asked for some, and what was given back."""

    def __init__(self, without: str = "") -> None:
        self.without, self.asked, self.given_back = without, [], []

    def reserve(self, name: str) -> str:
        self.asked.append(name)
        return f"room of {name}"

    def wait(self, reserved: str, timeout_s: float) -> bool:
        time.sleep(0.01)
        return reserved != f"room of {self.without}"

    def release(self, reserved: str) -> None:
        self.given_back.append(reserved)

    def says(self) -> str:
        return "1 CPU"


def test_at_the_end_the_room_of_whoever_was_made_or_waited_for_here_is_given_back(play, stage):
    spec = Spec(lambda name: Generator())
    spec.placement = Rooms(without="generator-2")  # pyright: ignore

    async def scene(each: Cast) -> None:
        await each.publish(0)
        write_desired(stage, 0, 3, "a person", "now")
        await until(lambda: each.conductor._fleet.figures()["fleet/generators_serving"] == 2)
        await until(lambda: (read_fleet(stage) or {}).get("waiting"))
        assert spec.placement.given_back == []
        await each.conductor.finish()
        assert each.killed == []  # learners that start again may have an evaluation made
        assert await each.conductor.survivors() == ["generator-0", "scoring-0"]
        assert sorted(spec.placement.given_back) == ["room of generator-1", "room of generator-2"]
        assert each.killed == [spec.made["generator-1"][0]]
        assert each.stream.failures == []

    specs = {"generators": spec, "reserved": {"generator-0": "room of generator-0"}}
    play(scene, settings=QUICK, specs=specs, directory=str(stage), **{"generator-0": 0.0})


def test_a_generator_that_could_not_be_made_is_made_again_in_the_room_that_was_asked_for(play, stage):
    def make(name: str) -> Generator:
        if name == "generator-1":
            raise RuntimeError("no environment for it")
        return Generator()

    spec = Spec(make)
    spec.placement = Rooms()  # pyright: ignore

    async def scene(each: Cast) -> None:
        await each.publish(0)
        write_desired(stage, 0, 2, "a person", "now")
        await until(lambda: each.stream.failures or each.conductor._fleet.figures()["fleet/generators_serving"] == 2)
        assert each.stream.failures == []
        assert each.conductor._fleet.generators.lost[1].startswith("generator-1 was given up: generator-1 could not be")
        assert (spec.placement.asked, spec.placement.given_back) == (["generator-1"], [])

    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage), **{"generator-0": 0.0})


def test_a_disk_that_refuses_or_hangs_holds_up_nobodys_health(play, stage, monkeypatch):
    spec, hangs = Spec(lambda name: Generator()), threading.Event()

    def refuse(directory: object, says: object) -> None:
        if not hangs.is_set():
            hangs.set()
            raise OSError(28, "No space left on device")
        time.sleep(3)

    monkeypatch.setattr(stage_fleet, "write_fleet", refuse)

    async def scene(each: Cast) -> None:
        await each.publish(0)
        await until(hangs.is_set)
        await asyncio.sleep(0.2)
        each.generators["two"].dead = True
        async with asyncio.timeout(2):
            await until(lambda: "two" in spec.made)
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage))


def test_every_publication_says_how_each_worker_is_and_who_was_lost_last_is_kept(play, stage):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        says = read_workers(stage)
        assert says is not None
        first = {row["name"]: row for row in says["workers"]}
        assert (says["attempt"], says["update"], set(first)) == (0, 0, {"one", "two", "scoring-0"})
        assert (first["one"]["state"], first["one"]["update"], first["one"]["busy_share"]) == ("healthy", 0, None)
        assert (first["scoring-0"]["role"], first["scoring-0"]["update"]) == ("scoring process", None)
        assert (read_fleet(stage) or {}).get("lost") is None
        each.generators["two"].dead = True
        await until(lambda: (read_fleet(stage) or {}).get("lost") is not None)
        assert read_fleet(stage)["lost"][1].startswith("two was given up: ")
        await until(lambda: each.conductor._fleet.figures()["fleet/generators_serving"] == 2)
        await each.publish(1)
        says = read_workers(stage)
        second = {row["name"]: row for row in says["workers"]}
        assert {name: row["update"] for name, row in second.items()} == {"one": 1, "two": 1, "scoring-0": None}
        assert second["two"]["incarnation"] == 1
        assert second["one"]["busy_share"] == 0.0
        assert second["one"]["peak_memory_bytes"] > 10 << 20

    play(scene, settings=QUICK, specs={"generators": spec}, directory=str(stage))


def test_a_wish_that_cannot_be_read_changes_nothing_and_is_told(play, stage):
    async def scene(each: Cast) -> None:
        (stage / "desired.json").write_text("{")
        await until(lambda: "cannot be read" in str((read_fleet(stage) or {}).get("problem")))
        assert each.stream.failures == []

    play(scene, settings=QUICK, specs={"generators": Spec(lambda name: Generator())}, directory=str(stage))


def test_a_wish_follows_the_one_that_was_seen(stage):
    assert read_desired(stage) is None
    first = write_desired(stage, 0, 4, "ann", "today")
    assert read_desired(stage) == first
    with pytest.raises(UsageProblem, match=r"^ann has asked for 4 generators at today, since this command looked"):
        write_desired(stage, 0, 2, "ben", "today")
    assert write_desired(stage, 1, 2, "ben", "today").counter == 2
    (stage / "desired.json").write_text('{"schema_version": 1, "counter": 1, "generators": 0, "who": "", "when": ""}')
    with pytest.raises(RunProblem, match="cannot be read"):
        read_desired(stage)


def test_nobody_is_replaced_after_the_end_and_the_drivers_own_that_live_are_named(play):
    spec = Spec(lambda name: Generator())

    async def scene(each: Cast) -> None:
        await each.publish(0)
        each.generators["one"].dead = True
        await until(lambda: "one" in spec.made and spec.made["one"][0].loaded)
        await turns()
        await each.conductor.finish()
        assert await each.conductor.survivors() == ["two", "scoring-0"], "the new one ends with the conductor"
        each.generators["two"].dead = True
        await asyncio.sleep(0.3)
        assert list(spec.made) == ["one"]

    play(scene, settings=QUICK, specs={"generators": spec})
