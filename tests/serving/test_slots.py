"""Slots with engines that are stand-ins: who goes for whom, what is followed, what is waited for."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from corpus.problems import RunProblem
from serving.desired import write_wish
from serving.engine import EngineSlot
from serving.errors import ApiError
from serving.feeds import TAKES
from serving.names import Weights
from serving.settings import ServingSettings
from serving.slots import DWELL_S, Slots


class StandInSlot:
    """Takes weights after `gate` opens."""

    def __init__(self, number: int, holds: str | None = None, used_at: float = 0.0) -> None:
        self.number, self.holds, self.version, self.used_at = number, holds, "old", used_at
        self.loading: str | None = None
        self.in_flight = 0
        self.served_since_load = 1
        self.loaded_at = 0.0
        self.broken: str | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.taken: list[str] = []

    async def take(self, name: str, weights: Weights, *, newer: bool = False) -> None:
        if newer and self.holds != name:
            return
        if weights.version == "damaged":
            raise RunProblem("The weights are damaged.", "run/unexpected")
        self.loading = name if self.holds != name else None
        await self.gate.wait()
        self.taken.append(f"{name} {weights.version}")
        self.holds, self.version, self.loading = name, weights.version, None


class StandInNames:
    """What names mean, as the test says."""

    def __init__(self, **meaning: str) -> None:
        self.meaning = meaning

    def find(self, name: str) -> Weights | None:
        return Weights(self.meaning[name]) if name in self.meaning else None


class StandInFeed:
    def __init__(self, names: StandInNames) -> None:
        self._names = names

    async def newest(self) -> Weights | None:
        return self._names.find("policy")


def slots_of(run: Path, each: list[StandInSlot], names: StandInNames) -> Slots:
    return Slots(run, list(each), names, StandInFeed(names), 0.01)  # pyright: ignore[reportArgumentType]


async def refusal(slots: Slots, name: str) -> str:
    with pytest.raises(ApiError) as caught:
        await slots.holding(name)
    return caught.value.code


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_model_takes_the_place_of_the_least_recently_used(tmp_path):
    async def scene() -> None:
        each = [StandInSlot(0, "policy", used_at=5), StandInSlot(1, "sft", used_at=3)]
        slots = slots_of(tmp_path, each, StandInNames(policy="old", sft="old", base="b"))
        assert await slots.holding("policy") is each[0]
        assert await refusal(slots, "base") == "model_loading"
        await until(lambda: each[1].holds == "base")
        assert await slots.holding("base") is each[1]
        assert each[0].taken == []
        assert await refusal(slots, "sft") == "model_loading"

    asyncio.run(scene())


def test_a_slot_with_requests_goes_last_and_an_empty_one_first(tmp_path):
    async def scene() -> None:
        busy, idle, empty = StandInSlot(0, "policy", 1), StandInSlot(1, "sft", 9), StandInSlot(2)
        busy.in_flight = 1
        names = StandInNames(policy="old", sft="old", base="b", reference="r", **{"policy-ema": "e"})
        slots = slots_of(tmp_path, [busy, idle, empty], names)
        await refusal(slots, "base")
        await until(lambda: empty.holds == "base")
        empty.used_at = 10
        await refusal(slots, "reference")
        await until(lambda: idle.holds == "reference")

    asyncio.run(scene())


def test_many_who_ask_at_once_load_a_model_once(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slot.gate.clear()
        slots = slots_of(tmp_path, [slot], StandInNames(policy="old", base="b"))
        codes = await asyncio.gather(*(refusal(slots, "base") for _ in range(20)))
        assert set(codes) == {"model_loading"}
        slot.gate.set()
        await until(lambda: slot.holds == "base")
        assert slot.taken == ["base b"]

    asyncio.run(scene())


def test_a_model_that_is_given_other_weights_in_its_slot_is_not_put_into_another(tmp_path):
    async def play() -> None:
        names = StandInNames(policy="1", **{"policy@3": "0.3"})
        one, other = StandInSlot(0, "policy"), StandInSlot(1)
        slots = slots_of(tmp_path, [one, other], names)
        other.loading = "policy@3"
        assert await refusal(slots, "policy@3") == "model_loading"
        await asyncio.sleep(0.02)
        assert (one.taken, other.taken) == ([], [])
        other.loading = None
        assert await refusal(slots, "policy@3") == "model_loading"
        await until(lambda: other.taken == ["policy@3 0.3"])

    asyncio.run(play())


def test_a_model_that_was_just_put_in_stays_until_it_was_used(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slot.served_since_load, slot.loaded_at = 0, time.monotonic()
        slots = slots_of(tmp_path, [slot], StandInNames(policy="old", base="b"))
        await refusal(slots, "base")
        await asyncio.sleep(0.02)
        assert slot.holds == "policy"
        slot.served_since_load = 1
        await refusal(slots, "base")
        await until(lambda: slot.holds == "base")
        slot.served_since_load, slot.loaded_at = 0, time.monotonic() - 2 * DWELL_S  # nobody came for it
        await refusal(slots, "policy")
        await until(lambda: slot.holds == "policy")

    asyncio.run(scene())


def test_without_an_engine_that_lives_nothing_is_said_to_be_loading(tmp_path):
    async def scene() -> None:
        each = [StandInSlot(0, "policy"), StandInSlot(1, "sft")]
        slots = slots_of(tmp_path, each, StandInNames(policy="old", sft="old", base="b"))
        each[0].broken = "it has died"
        assert await refusal(slots, "policy") == "model_loading"
        await until(lambda: each[1].holds == "policy")
        assert await slots.holding("policy") is each[1]
        each[1].broken = "it has died"
        assert await refusal(slots, "policy") == "engine_lost"
        assert await refusal(slots, "base") == "engine_lost"

    asyncio.run(scene())


def test_what_is_no_model_is_not_found_and_changes_nothing(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slots = slots_of(tmp_path, [slot], StandInNames(policy="old"))
        assert await refusal(slots, "../x") == "model_not_found"
        assert slot.taken == []

    asyncio.run(scene())


def test_weights_that_cannot_be_loaded_are_told_of_and_tried_again(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        names = StandInNames(policy="old", base="damaged")
        slots = slots_of(tmp_path, [slot], names)
        await refusal(slots, "base")
        await until(lambda: slots.problem is not None)
        assert "damaged" in slots.state()["problem"]
        assert slot.holds == "policy"
        names.meaning["base"] = "b"
        await refusal(slots, "base")
        await until(lambda: slot.holds == "base")

    asyncio.run(scene())


def test_newer_weights_are_followed_and_older_ones_are_not(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slot.version = "0.3"
        names = StandInNames(policy="0.4")
        slots = slots_of(tmp_path, [slot], names)
        await slots.follow_once()
        assert slot.taken == ["policy 0.4"]
        names.meaning["policy"] = "0.2"  # a feed that has fallen behind, such as files beside a store that has died
        await slots.follow_once()
        names.meaning["policy"] = "1.1"  # a later attempt
        await slots.follow_once()
        names.meaning["policy"] = "policy-abc"  # the export, once PPO is done
        await slots.follow_once()
        await slots.follow_once()
        assert slot.taken == ["policy 0.4", "policy 1.1", "policy policy-abc"]

    asyncio.run(scene())


def test_a_slot_that_waits_for_its_requests_keeps_no_other_one_from_newer_weights(tmp_path):
    async def scene() -> None:
        busy, free = StandInSlot(0, "sft"), StandInSlot(1, "policy")
        names = StandInNames(sft="again", policy="0.4")
        following = asyncio.create_task(slots_of(tmp_path, [busy, free], names).follow())
        busy.gate.clear()
        await until(lambda: free.taken == ["policy 0.4"])
        names.meaning["policy"] = "0.5"
        await until(lambda: free.taken == ["policy 0.4", "policy 0.5"])
        assert busy.taken == []
        busy.gate.set()
        await until(lambda: busy.taken == ["sft again"])
        following.cancel()
        assert busy.taken == ["sft again"], "it was asked to take them more than once"

    asyncio.run(scene())


def test_what_people_pin_is_served_until_they_let_go(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slot.version = "0.4"
        slots = slots_of(tmp_path, [slot], StandInNames(policy="0.4", **{"policy@2": "0.2"}))
        write_wish(tmp_path, "policy@2", 0, "ada", "now")
        await slots.follow_once()
        assert (slot.version, slots.state()["wish"]) == ("0.2", 1)
        write_wish(tmp_path, "policy@9", 1, "ada", "now")
        await slots.follow_once()
        assert slot.version == "0.2"
        assert "policy@9 is wanted" in (slots.problem or "")
        write_wish(tmp_path, None, 2, "ada", "now")
        await slots.follow_once()
        assert slot.version == "0.4"
        assert slots.problem is None

    asyncio.run(scene())


def test_a_damaged_wish_does_not_stop_what_is_served(tmp_path):
    async def scene() -> None:
        slot = StandInSlot(0, "policy")
        slot.version = "0.3"
        slots = slots_of(tmp_path, [slot], StandInNames(policy="0.4"))
        (tmp_path / "serving").mkdir()
        (tmp_path / "serving" / "desired.json").write_text("{")
        await slots.follow_once()
        assert slot.version == "0.4"
        assert "cannot be read" in (slots.problem or "")

    asyncio.run(scene())


class RemovedMeanwhile(StandInFeed):
    """Names weights that are gone when they are read, `times` times."""

    def __init__(self, names: StandInNames, times: int) -> None:
        super().__init__(names)
        self.left = times

    async def newest(self) -> Weights | None:
        self.left -= 1
        return Weights("damaged") if self.left >= 0 else await super().newest()


@pytest.mark.parametrize(("times", "holds"), [(0, True), (TAKES - 1, True), (TAKES, False)])
def test_a_start_looks_again_for_weights_that_were_removed_before_they_were_read(tmp_path, times, holds):
    async def start() -> StandInSlot:
        slot, names = StandInSlot(0, "policy"), StandInNames(policy="0.2")
        feed = RemovedMeanwhile(names, times)
        await Slots(tmp_path, [slot], names, feed, 0.01).catch_up()  # pyright: ignore[reportArgumentType]
        return slot

    if holds:
        assert asyncio.run(start()).version == "0.2"
    else:
        with pytest.raises(RunProblem):
            asyncio.run(start())


class StandInWeights:
    """Weights without files."""

    def __init__(self, version: str) -> None:
        self.version, self.directory, self.snapshot = version, None, None

    def check(self) -> None:
        """They are whole."""

    def files(self) -> list[Path]:
        """There are none."""
        return []


@pytest.mark.parametrize(("name", "goes_on"), [("policy", True), ("policy@3", False), ("sft", False)])
def test_only_the_policy_is_given_other_weights_while_it_answers(name, goes_on, monkeypatch):
    """policy@3 is another version where a later attempt of the run has published its update 3."""

    async def play() -> None:
        slot: Any = EngineSlot(0, ServingSettings(), 64)
        put: list[str] = []

        async def swap(weights: Any, *, keeps_kv: bool) -> None:
            assert keeps_kv is goes_on
            put.append(weights.version)

        monkeypatch.setattr(slot, "_swap", swap)
        monkeypatch.setattr(slot, "_now_holds", lambda name, version: vars(slot).update(holds=name, version=version))
        slot.holds, slot.version = name, "0.3"
        slot._idle.clear()  # a request is under way
        taking = asyncio.create_task(slot.take(name, StandInWeights("1.3"), newer=True))
        await until(lambda: put or slot.loading)
        assert (put, slot.holds) == ((["1.3"], name) if goes_on else ([], None))
        slot._idle.set()
        await taking
        assert (put, slot.holds, slot.version, slot.loading) == (["1.3"], name, "1.3", None)

    asyncio.run(play())
