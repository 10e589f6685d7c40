import itertools
import json
import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bench import control_plane
from bench.scaling import Latency, Level, Linearity, full, latency_of, linearity, percentile, table, verdict
from bench.simulated_generators import Observed, Seat, chunk_seconds, logprob_of, probe_of, snapshot_of
from bench.simulated_stage import (
    CHUNK_SIZE,
    CHUNKS_MEASURED,
    STALENESS,
    UPDATE_S,
    Options,
    TimeUp,
    cast_of,
    problem_with,
    stage_of,
)
from models.snapshot import unpack

LEVEL = Level(
    generators=64,
    seconds=10.0,
    episodes=2400,
    episodes_per_s=240.0,
    lease=Latency(600, 0.002, 0.030),
    accept=Latency(600, 0.004, 0.050),
    publish_s=[0.25, 0.5, 0.75],
    cores={"stream": 0.4, "conductor": 0.05, "store": 0.01, "generators": 1.1, "scoring": 0.2},
    machine_cores=1.5,
    waiting=0.02,
    late=0.01,
    load=1.0,
)
COUNTS = {"stream/generated": 96, "stream/trained": 64, "stream/regenerated": 0, "stream/duplicates": 0}


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed():
    hundred = [float(value) for value in range(1, 101)]
    assert percentile(hundred[::-1], 0.5) == 50.0
    assert percentile(hundred, 0.99) == 99.0
    assert percentile(hundred, 1.0) == 100.0
    assert percentile([7.0], 0.99) == percentile([7.0], 0.0) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0  # not the mean of others, and not the lowest
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_one_slow_call_in_a_hundred_does_not_move_the_99th_percentile_and_two_do():
    assert latency_of([0.001] * 99 + [9.0]) == Latency(100, 0.001, 0.001)
    assert latency_of([0.001] * 98 + [9.0] * 2) == Latency(100, 0.001, 9.0)


def test_linearity_ends_at_the_first_number_that_falls_short_by_more_than_a_tenth():
    made = {1: 4.0, 2: 8.1, 4: 15.0, 8: 28.7, 16: 64.0}
    assert linearity(made, rate=4.0) == Linearity(4, 8)  # 28.7 of 32; that 16 make 64 does not help
    assert linearity(made | {8: 28.9}, rate=4.0) == Linearity(16, None)
    assert linearity(made, rate=4.0, tolerance=0.2) == Linearity(16, None)
    assert linearity(made, rate=4.0, tolerance=0.05) == Linearity(2, 4)
    assert linearity({16: 64.0, 1: 4.0, 8: 20.0}, rate=4.0) == Linearity(1, 8)  # in whatever order they come


def test_more_than_so_many_generators_can_make_is_linear_and_less_from_the_first_on_is_not():
    assert linearity({1: 5.0, 2: 9.0}, rate=4.0) == Linearity(2, None)
    assert linearity({1: 3.5, 2: 8.0}, rate=4.0) == Linearity(None, 1)
    assert linearity({}, rate=4.0) == Linearity(None, None)


def test_the_verdict_says_where_it_ends_and_what_was_full_there():
    slow = replace(LEVEL, generators=128, episodes_per_s=300.0, waiting=0.41)
    busy = replace(slow, cores=LEVEL.cores | {"stream": 0.97}, machine_cores=1.99)
    told = verdict([LEVEL, busy], 4.0, cores=2)
    assert "within 10% up to 64 generators; 128 made 0.59 of linear" in told
    assert "41%" in told
    assert (
        "the stream's process used 0.97 of a core and the machine used 1.99 of its 2 cores, the simulation 2.33" in told
    )
    assert "Nothing was full" in verdict([LEVEL, slow], 4.0, cores=2)
    assert verdict([LEVEL], 4.0, cores=2).endswith("up to 64 generators, the most that were measured.")
    assert verdict([slow], 4.0, cores=2).startswith("Not linear from the first on; 128")


def test_several_processes_of_generators_are_not_called_full_for_using_more_than_a_core():
    assert full(LEVEL, cores=2) == []
    [clause] = full(replace(LEVEL, machine_cores=1.8), cores=2)
    assert clause == "the machine used 1.80 of its 2 cores, the simulation 1.76 of them"
    assert full(replace(LEVEL, machine_cores=1.8), cores=4) == []


def test_the_table_has_a_line_a_level_under_its_heads():
    lines = table([LEVEL, replace(LEVEL, generators=256, publish_s=[2.0])], 4.0)
    assert len({len(line) for line in lines}) == 1
    values = lines[2].split()
    assert values[:7] == ["64", "240.0", "0.94", "2.0", "30.0", "4.0", "50.0"]
    assert values[7:9] == ["0.500", "0.750"]
    assert values[-2:] == ["2%", "1%"]
    assert lines[3].split()[7:9] == ["2.000", "2.000"]


def test_two_chunks_take_twice_the_mean_and_no_two_generators_the_same():
    one, other = (list(itertools.islice(chunk_seconds(2.0, name), 100)) for name in ("one", "other"))
    assert all(a + b == pytest.approx(4.0) for a, b in zip(one[::2], one[1::2], strict=True))
    assert 1.0 <= min(one) < 1.2
    assert 2.8 < max(one) <= 3.0
    assert one == list(itertools.islice(chunk_seconds(2.0, "one"), 100))
    assert one != other


def test_batches_are_so_many_seconds_of_all_generators_in_whole_chunks():
    options = Options(rate=4.0, seconds=10.0, give_up=0.0)
    assert options.batch_size(256) == 256 * 4 * UPDATE_S
    assert Options(0.1, 10.0, 0.0).batch_size(1) == CHUNK_SIZE  # one chunk at least
    assert options.batch_size(3) % CHUNK_SIZE == 0
    assert options.measured_s(256) == 10.0
    assert options.measured_s(1) == 30.0  # thirty chunks of a second
    assert STALENESS >= 1  # else generators would wait for the learner by design, and that be measured


def test_what_is_seen_in_two_looks_adds_up_and_is_measured_only_once_it_is_enough():
    first = Observed(1.0, [0.1], [0.2], 4, 0.5, 0.6)
    later = Observed(0.5, [], [0.3] * (CHUNKS_MEASURED - 1), 8, 0.25, 0.3)
    both = first.and_then(later)
    assert (both.seconds, both.lease_s, both.episodes, both.drawn_s) == (1.5, [0.1], 12, 0.75)
    assert both.accept_s == [0.2] + [0.3] * (CHUNKS_MEASURED - 1)
    assert first.lease_s == [0.1]
    assert control_plane._enough([both])
    assert control_plane._enough([first, later])
    assert not control_plane._enough([first])
    assert not control_plane._enough([later, later])  # accepted, but nothing leased


def test_counts_that_do_not_agree_are_told():
    right = COUNTS | {"stream/refused": 0}
    assert problem_with(96, 64, right) is None
    for name in right:
        problem = problem_with(96, 64, right | {name: right[name] + 4})
        assert problem is not None
        assert f"{right[name] + 4} {name.removeprefix('stream/')} where {right[name]} were to be" in problem
    assert problem_with(92, 64, right) is not None


def test_the_probe_fits_the_weights_of_its_update_and_no_others():
    [(_, weight)] = unpack(snapshot_of(3))
    assert {float(each) for each in weight[:8]} == {logprob_of(3)} == {probe_of(3).logprobs[0][0]}
    assert abs(probe_of(4).logprobs[0][0] - float(weight[0])) > probe_of(3).bound_nats


def test_a_seat_calls_its_host_by_name_also_after_a_journey():
    seat = pickle.loads(pickle.dumps(Seat("host", "generator-3")))
    assert seat == Seat("host", "generator-3")
    assert seat.upper.name == "generator-3"
    assert getattr(seat, "_actor_id", None) is None
    with pytest.raises(AttributeError):
        _ = seat.there_is_no_such_method


def test_what_there_is_no_time_for_is_not_begun(tmp_path):
    late = Options(rate=4.0, seconds=10.0, give_up=time.monotonic() + 20.0)
    with pytest.raises(TimeUp, match="no time left for 8 generators, which would take 29 s"):
        list(control_plane.measured([8], late, None, tmp_path))  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--processes", "9"], ["--generators", "0"], ["--rate", "0"]])
def test_what_cannot_be_simulated_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        control_plane.main(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def simulation():
    """Options of a second a level, and the processes of two hosts."""
    from cluster.session import session

    with session(None, cpus=1):
        logging.getLogger("ray").setLevel(logging.ERROR)
        options = Options(rate=40.0, seconds=1.0, give_up=time.monotonic() + 240.0)
        yield options, cast_of(2, options)


@pytest.mark.slow
@pytest.mark.extended  # the same actors as in the next one, for longer
def test_two_and_four_generators_are_measured_on_the_real_actors(simulation, tmp_path):
    options, cast = simulation
    levels = list(control_plane.measured([2, 4], options, cast, tmp_path))
    assert [level.generators for level in levels] == [2, 4]
    for level in levels:
        assert level.seconds >= 1.0
        assert 0 < level.episodes == level.accept.calls * CHUNK_SIZE
        assert 0 < level.episodes_per_s <= 1.5 * level.generators * options.rate
        assert 0 < level.lease.p50_s <= level.lease.p99_s
        assert 0 <= level.waiting < 1
        assert level.cores.keys() == {"stream", "conductor", "store", "generators", "scoring"}
        assert level.cores["stream"] > 0
        assert level.publish_s
        assert sum(level.cores.values()) <= level.machine_cores * 1.5 + 0.1
    answer = control_plane._answer(levels, [8], options, cores=2)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


@pytest.mark.slow
def test_a_publication_that_does_not_fit_its_probe_fails(simulation, tmp_path):
    import ray
    from ray.exceptions import RayTaskError

    options, cast = simulation
    with stage_of(2, options, cast, tmp_path) as stage, ThreadPoolExecutor(1) as pool:
        learning, deadline = pool.submit(stage.learn), time.monotonic() + 100
        try:
            while len(stage.published) < 2 and not learning.done():
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            stage.stop.set()
        learning.result()
        stage.end()
        assert list(tmp_path.glob("episodes/update-000001-*.parquet"))  # a right one went before
        wrong = stage.conductor.publish.remote(0, 8, snapshot_of(8), probe_of(9))
        with pytest.raises(RayTaskError, match="nats away from the learner"):
            ray.get(wrong, timeout=60)
