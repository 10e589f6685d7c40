"""A publication from the learner's GPU on its way to the engines, without vLLM: who is given the offer, who is not."""

from typing import Any

import pytest
from stand_in_cast import PROBE, Cast, snapshot
from stand_in_engine import StandInEngine

from actors import generator as module
from actors.generator import RolloutGenerator
from actors.settings import RolloutSettings
from corpus.problems import RunProblem

OFFER = {"names": ["weight"], "dtype_names": ["float32"], "shapes": [[3]], "ipc_handles": [{"GPU-a": (0,)}]}


def test_the_generators_of_a_publication_are_given_its_offer_and_who_is_refitted_later_is_not(play):
    taken: list[tuple[Any, ...]] = []

    async def load(_: Any, label: str, *offer: Any) -> float:
        taken.append((label, *offer))
        return 0.25

    async def scene(each: Cast) -> None:
        for generator in each.generators.values():
            generator.load = load
        await each.conductor.publish(0, 0, snapshot(0), PROBE, OFFER)
        assert taken == [("0.0", OFFER)] * 2
        [first, *_] = each.conductor._fleet.generators.members
        await each.conductor._refit_one(first, each.conductor._fleet.generators.members[first].incarnation)
        assert taken[2:] == [("0.0",)]  # what the GPU held of that publication is gone
        await each.conductor.publish(0, 1, snapshot(1), PROBE)
        assert taken[3:] == [("0.1",)] * 2

    play(scene)


def test_a_generator_hands_the_offer_to_its_engine_and_goes_back_to_the_snapshot_after_samples(monkeypatch):
    monkeypatch.setattr(module.ray, "get", lambda reference, timeout: reference)
    each: Any = RolloutGenerator.__ray_metadata__.modified_class("g", RolloutSettings())  # pyright: ignore
    engine: Any = StandInEngine()
    each._engine = engine
    assert each.load(snapshot(0), "0.0", OFFER) == 0.5
    assert engine.offer == OFFER
    monkeypatch.setattr(module, "sample_requests", lambda *_: [])
    monkeypatch.setattr(module, "samples_table", lambda *_: "samples")
    assert each.sample(None, 1, None, 0, [snapshot(9)]) == "samples"
    assert engine.sampled_under == "sample"
    assert (engine.version, engine.offer) == ("0.0", None)


def test_where_no_generator_can_receive_nothing_is_admitted_and_the_reason_is_told(play):
    async def cannot(_: Any, label: str, *offer: Any) -> float:
        raise RunProblem(
            f"Weights {label} could not be received over ipc: IPC handle not found for GPU UUID GPU-b.",
            "run/unexpected",
        )

    async def scene(each: Cast) -> None:
        for generator in each.generators.values():
            generator.load = cannot
        with pytest.raises(RunProblem, match=r"Weights 0\.0 could not be received over ipc: IPC handle not found"):
            await each.conductor.publish(0, 0, snapshot(0), PROBE, OFFER)
        assert each.stream.admitted == []

    play(scene)
