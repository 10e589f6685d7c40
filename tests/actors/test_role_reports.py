import pytest

from actors.role_reports import RoleReport, report_now, role_figures


def report(at_s: float, busy_s: float, tokens: int = 0, cpu_s: float = 0.0, peak_bytes: int = 10) -> RoleReport:
    return RoleReport(at_s, busy_s, tokens, cpu_s, peak_bytes)


def test_shares_are_of_the_time_between_two_reports():
    before = {"generator-0": report(100, 50, 1000, 60)}
    now = {"generator-0": report(110, 54, 1300, 75, 20)}
    assert role_figures("generators", before, now) == {
        "memory/generators_bytes": 20.0,
        "generators/busy_share": pytest.approx(0.4),
        "generators/cores": pytest.approx(1.5),
        "generators/tokens_per_second": pytest.approx(30),
    }


def test_shares_are_means_and_tokens_are_sums_over_actors():
    before = {"a": report(0, 0), "b": report(0, 0)}
    now = {"a": report(10, 10, 100, 10), "b": report(10, 0, 50, 2)}
    figures = role_figures("scoring", before, now)
    assert figures["scoring/busy_share"] == pytest.approx(0.5)
    assert figures["scoring/tokens_per_second"] == pytest.approx(15)
    assert figures["scoring/cores"] == pytest.approx(0.6)


def test_a_first_report_gives_memory_alone():
    assert role_figures("generators", {}, {"a": report(1, 1)}) == {"memory/generators_bytes": 10.0}


def test_an_actor_that_came_later_is_left_out_of_shares():
    figures = role_figures("generators", {"a": report(0, 0)}, {"a": report(10, 5), "b": report(10, 5)})
    assert figures["generators/busy_share"] == pytest.approx(0.5)


def test_this_process_reports_itself():
    found = report_now(3.0, 7)
    assert (found.busy_s, found.tokens) == (3.0, 7)
    assert found.cpu_s > 0
    assert found.peak_bytes > 10 << 20
