"""A soak must see memory that grows, and nothing in memory that does not."""

from growth import FACTOR, MIB, SLACK_MIB, YOUNG_S, Sample, growth_of, not_judged, too_young


def samples(held_mib, role="stream", age=1000.0):
    return [Sample(role, at, age, int(held_mib(at) * MIB)) for at in range(0, 900, 5)]


def test_a_role_that_holds_the_same_is_bounded():
    [steady] = growth_of(samples(lambda at: 200.0 + at % 10), 900.0)
    assert steady.bounded
    assert 200.0 <= min(steady.first, steady.last) <= max(steady.first, steady.last) <= steady.peak == 205.0


def test_a_leak_is_seen_beyond_what_allocators_keep():
    over = 200.0 * (FACTOR - 1) + SLACK_MIB + 2.0
    [leaking] = growth_of(samples(lambda at: 200.0 + over * at / 600), 900.0)
    assert not leaking.bounded
    [below] = growth_of(samples(lambda at: 200.0 + 0.5 * over * at / 600), 900.0)
    assert below.bounded


def test_each_role_is_judged_by_its_own():
    found = growth_of(samples(lambda at: 100.0) + samples(lambda at: 100.0 + at, "generator"), 900.0)
    assert {each.role: each.bounded for each in found} == {"stream": True, "generator": False}


def test_processes_that_still_load_and_roles_without_a_beginning_or_an_end_are_left_out():
    young = samples(lambda at: 10.0, "conductor", YOUNG_S - 1)
    late = [each for each in samples(lambda at: 10.0, "late") if each.at > 700]
    assert growth_of(young + late, 900.0) == []


def test_a_role_of_which_nothing_is_known_is_named():
    growth = growth_of(samples(lambda at: 100.0) + samples(lambda at: 10.0, "conductor", YOUNG_S - 1), 900.0)
    assert not_judged(growth, ["stream"]) == []
    assert not_judged(growth, ["stream", "conductor", "driver"]) == ["conductor", "driver"]


def test_a_leak_of_processes_that_do_not_live_long_hides_and_how_long_they_lived_is_told():
    """Each holds 30 MiB more every minute, and is followed by another after 200 s."""
    leak = [Sample("stream", at, at % 200, int((100 + at % 200 / 2) * MIB)) for at in range(0, 1800, 5)]
    [hidden] = growth_of(leak, 1800.0)
    assert hidden.bounded
    assert hidden.oldest_s < 200
    assert too_young([hidden], 1800.0) == ["stream"]
    [seen] = growth_of([Sample("stream", at, at, int((100 + at / 15) * MIB)) for at in range(0, 1800, 5)], 1800.0)
    assert not seen.bounded  # 4 MiB a minute, in one that lives
    assert too_young([seen], 1800.0) == []
