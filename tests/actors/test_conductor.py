"""The conductor among stand-ins, all in one event loop: what it waits for, whom it names, and what it refuses."""

import asyncio
import re

import numpy as np
import pytest
import torch
from stand_in_cast import PROBE, SAMPLING, Cast, held_out, snapshot, turns, until

from actors import stage_fleet
from corpus.problems import RunProblem, UsageProblem
from models.snapshot import Snapshot, pack


def test_a_version_is_admitted_once_every_generator_holds_it(play):
    async def scene(each: Cast) -> None:
        each.generators["two"].gate.clear()
        publishing = asyncio.ensure_future(each.publish())
        await turns()
        assert each.generators["one"].loaded == ["0.0"]
        assert each.stream.admitted == []
        each.generators["two"].gate.set()
        publication = await publishing
        assert each.stream.admitted == [(0, 0)]
        assert publication.pause_s == 0.25
        assert publication.probe_nats == 0.0

    play(scene)


def test_publications_do_not_overtake_each_other(play):
    async def scene(each: Cast) -> None:
        each.generators["one"].gate.clear()
        publishing = [asyncio.ensure_future(each.publish(update)) for update in (0, 1)]
        await turns()
        assert each.generators["two"].loaded == ["0.0"]
        each.generators["one"].gate.set()
        await asyncio.gather(*publishing)

    each = play(scene)
    assert [generator.loaded for generator in each.generators.values()] == [["0.0", "0.1"], ["0.0", "0.1"]]
    assert each.stream.admitted == [(0, 0), (0, 1)]


def test_a_publication_says_the_memory_of_conductor_weight_store_and_driver(play):
    async def scene(each: Cast) -> None:
        assert "memory/driver_bytes" not in (await each.publish(0)).roles
        await each.conductor.hear_of_driver(7 << 20)
        roles = (await each.publish(1)).roles
        assert roles["memory/driver_bytes"] == 7 << 20
        assert roles["memory/conductor_bytes"] > 10 << 20
        assert roles["memory/weight_store_bytes"] > 10 << 20

    play(scene)


def test_a_publication_of_an_attempt_that_is_over_comes_into_no_engine(play):
    async def scene(each: Cast) -> None:
        newer = pack({"weight": torch.ones(3)}, (2, 0))
        await each.conductor.publish(2, 0, newer, PROBE)
        with pytest.raises(RunProblem, match=r"^Weights 3 of attempt 1 were to be published, but"):
            await each.conductor.publish(1, 3, snapshot(3), PROBE)
        await each.conductor.publish(2, 0, newer, PROBE)

    each = play(scene)
    assert [generator.loaded for generator in each.generators.values()] == [["2.0", "2.0"]] * 2
    assert each.stream.admitted == [(2, 0), (2, 0)]


def test_a_generator_that_is_late_is_given_up_and_named_and_the_others_go_on(play):
    async def scene(each: Cast) -> None:
        each.generators["slow"].gate.clear()
        await each.publish()
        await until(lambda: each.stream.failures)
        assert str(each.stream.failures[0]) == (
            "slow was lost (after 0 s it had yet to load weights 0.0), and nothing is known of how to make another; "
            "the same command continues from what was last saved."
        )

    each = play(scene, deadline_s=0.1, quick=0.0, slow=0.0)
    assert each.stream.admitted == [(0, 0)]
    assert each.killed == [each.generators["slow"]]
    assert each.stream.released == ["slow"]


def test_a_generator_that_died_is_given_up_and_the_others_go_on(play):
    async def scene(each: Cast) -> None:
        each.generators["dead"].dead = True
        await each.publish()
        await until(lambda: each.stream.failures)
        assert re.search(
            r"^dead was lost \(dead died before it could load weights 0\.0: ", str(each.stream.failures[0])
        )

    assert play(scene, living=0.0, dead=0.0).stream.admitted == [(0, 0)]


@pytest.mark.parametrize("silent", [True, False])
def test_a_stream_that_says_nothing_or_died_is_named(play, silent):
    async def scene(each: Cast) -> None:
        each.stream.silent, each.stream.dead = silent, not silent
        told = (
            r"^Waited 0 s for the episode stream to admit the slots of weights 0\.0 and gave up\.$"
            if silent
            else r"^The episode stream died before it could admit the slots of weights 0\.0: "
        )
        with pytest.raises(RunProblem, match=told):
            await each.publish()
        if silent:
            with pytest.raises(RunProblem, match=r"^Waited 0 s for the episode stream to take note of a failure"):
                await each.conductor.failed("one", RunProblem("a failure", "run/unexpected"))

    play(scene, deadline_s=0.1)


def test_reports_that_are_late_or_fail_are_left_out_and_hold_up_no_later_publication(play, monkeypatch):
    monkeypatch.setattr(stage_fleet, "REPORT_PATIENCE_S", 0.5)

    async def scene(each: Cast) -> None:
        scoring = each.scoring.actor
        scoring.gate.clear()
        first = asyncio.ensure_future(each.publish(0))
        await turns()
        assert each.stream.admitted == [(0, 0)]
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(each.publish(1))
        await turns()
        assert each.stream.admitted == [(0, 0), (0, 1)], "the lock is not held while reports are awaited"
        for publication in (await first, await second):
            assert "memory/generators_bytes" in publication.roles
            assert not [name for name in publication.roles if "scoring" in name]
        scoring.gate.set()
        scoring.broken = True
        assert "memory/scoring_bytes" not in (await each.publish(2)).roles
        scoring.broken = False
        assert "memory/scoring_bytes" in (await each.publish(3)).roles
        assert "scoring/cores" in (await each.publish(4)).roles
        scoring.broken = True
        await each.publish(5)
        scoring.broken = False
        assert "scoring/cores" in (await each.publish(6)).roles, "since the report before the missing one"

    play(scene)


def test_a_publication_waits_for_a_generator_that_samples_and_for_no_other(play):
    async def scene(each: Cast) -> None:
        await each.publish(0)
        one, two = each.generators.values()
        one.samples_gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        publishing = asyncio.ensure_future(each.publish(1))
        await asyncio.sleep(0.6)  # three deadlines of a publication
        assert not publishing.done()
        one.samples_gate.set()
        await publishing
        await evaluating
        assert one.loaded == two.loaded == ["0.0", "0.1"]

        one.samples_gate.clear()
        two.gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        asyncio.get_running_loop().call_later(0.5, one.samples_gate.set)
        await each.publish(2)
        await evaluating
        assert each.killed == [two], "one sampled, two was merely late"
        assert each.stream.admitted[-1] == (0, 2)

    play(scene, deadline_s=0.2, sampling_deadline_s=20)


def test_a_generator_that_began_to_sample_after_the_call_is_waited_for_too(play):
    async def scene(each: Cast) -> None:
        one = each.generators["one"]
        one.gate.clear()
        one.samples_gate.clear()
        publishing = asyncio.ensure_future(each.publish(0))
        await turns()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        one.gate.set()
        await asyncio.sleep(0.5)
        one.samples_gate.set()
        await publishing
        await evaluating

    assert play(scene, deadline_s=0.2, sampling_deadline_s=20).stream.admitted == [(0, 0)]


def test_held_out_samples_have_a_deadline_of_their_own_after_which_a_publication_goes_on_without(play):
    async def scene(each: Cast) -> None:
        each.generators["one"].samples_gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        publishing = asyncio.ensure_future(each.publish(0))
        with pytest.raises(RunProblem, match=r"^Waited 1 s for one to sample the held-out prompts and gave up"):
            await evaluating
        await publishing

    each = play(scene, deadline_s=0.2, sampling_deadline_s=1.0)
    assert each.killed == [each.generators["one"]]
    assert each.stream.admitted == [(0, 0)], "two holds it"


def test_what_generators_have_in_hand_is_waited_for_as_long_as_samples(play):
    async def scene(each: Cast) -> None:
        one = each.generators["one"]
        one.gate.clear()
        asyncio.get_running_loop().call_later(0.5, one.gate.set)
        await each.conductor.finish()
        assert one.rested
        one.gate.clear()
        assert each.killed == []
        await each.conductor.finish()
        assert each.killed == [one]
        assert each.stream.failures == [], "nobody needs it any more"

    play(scene, deadline_s=0.1, sampling_deadline_s=1.0)


def test_a_scorer_that_died_during_an_evaluation_is_named(play):
    async def scene(each: Cast) -> None:
        each.scoring.actor.dead = True
        with pytest.raises(RunProblem, match=r"^The reward scorer died before it could score the held-out responses: "):
            await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING)

    play(scene)


@pytest.mark.parametrize("off", [0.002, -0.5, float("nan")])
def test_weights_that_no_generator_scores_as_the_learner_does_are_refused(play, off):
    async def scene(each: Cast) -> None:
        with pytest.raises(RunProblem, match=r"^wrong holds weights 0\.0 but scores the probe .* bound of 0\.001"):
            await each.publish()

    assert play(scene, wrong=off, other=off).stream.admitted == []


@pytest.mark.parametrize("off", [0.002, -0.5, float("nan")])
def test_a_generator_that_alone_disagrees_with_the_learner_is_given_up(play, off):
    async def scene(each: Cast) -> None:
        publication = await each.publish()
        assert publication.probe_nats == 0.0, "of those that serve"
        assert each.killed == [each.generators["wrong"]]
        await until(lambda: each.stream.failures)
        assert re.search(
            r"^wrong was lost \(wrong holds weights 0\.0 but scores the probe", str(each.stream.failures[0])
        )

    assert play(scene, right=0.0, wrong=off).stream.admitted == [(0, 0)]


def test_a_probe_within_the_bound_is_reported(play):
    async def scene(each: Cast) -> None:
        publication = await each.publish()
        assert publication.probe_nats == pytest.approx(0.0005)
        assert publication.probe_mean_nats == pytest.approx((0.0005 + 0.0002) / 6)  # of two generators' three tokens

    assert play(scene, one=0.0005, two=-0.0002).stream.admitted == [(0, 0)]


def test_a_damaged_snapshot_reaches_no_generator(play):
    async def scene(each: Cast) -> None:
        whole = snapshot(0)
        buffer = np.array(whole.buffer)
        buffer[0] ^= 1
        damaged = Snapshot(whole.version, buffer, whole.manifest, whole.checksum)
        with pytest.raises(RunProblem, match="is damaged: its checksum does not match"):
            await each.conductor.publish(0, 0, damaged, PROBE)

    assert play(scene).generators["one"].loaded == []


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (RunProblem("reward f: nan", "run/unexpected"), "^reward f: nan$"),
        (UsageProblem("a wrong key", "data/row"), "^a wrong key$"),
        (KeyError("x"), "^generator-1 could not go on: KeyError: 'x'$"),
    ],
)
def test_the_first_failure_of_an_actor_is_told_through_the_stream(play, problem, told):
    async def scene(each: Cast) -> None:
        await each.conductor.failed("generator-1", problem)
        await each.conductor.failed("generator-2", RunProblem("a later one", "run/unexpected"))

    failures = play(scene).stream.failures
    assert len(failures) == 2, "each actor that failed waits for the stream to know"
    for failure in failures:
        assert type(failure) is (UsageProblem if isinstance(problem, UsageProblem) else RunProblem)
        assert re.search(told, str(failure))


def test_generators_work_and_rest_when_they_are_told(play):
    async def scene(each: Cast) -> None:
        await each.conductor.start_leasing()
        assert all(generator.worked and not generator.rested for generator in each.generators.values())
        await each.conductor.finish()

    assert all(generator.rested for generator in play(scene).generators.values())


def test_held_out_prompts_are_sampled_scored_and_judged(play):
    judged = held_out(lambda meta, response: float(meta) if response == "five six" else 0.0)

    async def scene(each: Cast) -> None:
        found = await each.conductor.evaluate(snapshot(9), judged, SAMPLING)
        assert found == {"reward": 1.5, "gold": 4.0, "kl": 1.0, "length": 2.0, "eos_rate": 0.5}
        assert (await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))["gold"] is None

    play(scene)
