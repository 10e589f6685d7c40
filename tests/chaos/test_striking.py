"""The killer knows whether it struck whom it was to strike, when it was to: else a cell would prove nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import phases
import pytest
import table
from cells import ALL, FAST, HOLDERS, Cell
from harness import Outcome, end_processes
from striking import await_phase, fill_disk, strike_process

HOLDER = """
import sys, time, phases
phases.register(sys.argv[1])
phases.HOLD_S = float(sys.argv[3])
phases.linger(sys.argv[1], sys.argv[2], phases.FROM_UPDATE)
open(phases.cell_directory() / "went-on", "w").close()
time.sleep(60)
"""


@pytest.fixture
def cell(tmp_path):
    """The directory of a cell whose scorer is to hold the phase of generation open."""
    (tmp_path / "processes").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps({"holder": "scorer", "phase": "generating", "target": "scorer"}))
    yield tmp_path
    end_processes(tmp_path, patience_s=0)


def hold(cell: Path, role: str = "scorer", phase: str = "generating", hold_s: float = 10.0) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
    given = {**os.environ, phases.VARIABLE: str(cell), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", HOLDER, role, phase, str(hold_s)], env=given)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_strike_in_the_phase_lands(cell, number):
    process = hold(cell)
    assert await_phase(cell, "generating", 30)["pid"] == process.pid
    strike = strike_process(cell, "scorer", "generating", number)
    assert (strike.landed, strike.pid) == (True, process.pid)
    assert not (cell / "went-on").exists()


def test_a_process_of_another_role_is_not_struck(cell):
    process = hold(cell)
    await_phase(cell, "generating", 30)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        strike = strike_process(cell, "scorer", "generating", signal.SIGKILL, pid=bystander.pid)
        assert strike.problem == f"process {bystander.pid} does not play scorer"
        assert (
            strike_process(cell, "stream", "generating", signal.SIGKILL).problem == "no process that lives plays stream"
        )
        assert (bystander.poll(), process.poll()) == (None, None)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_strike_in_another_phase_does_not_land(cell):
    process = hold(cell)
    await_phase(cell, "generating", 30)
    assert not strike_process(cell, "scorer", "publishing", signal.SIGKILL).landed
    assert process.poll() is None


def test_a_strike_after_the_phase_does_not_land(cell):
    hold(cell, hold_s=0.1)
    await_phase(cell, "generating", 30)
    deadline = time.monotonic() + 30
    while not (cell / "went-on").exists():
        assert time.monotonic() < deadline, "the holder goes on by itself"
        time.sleep(0.01)
    assert strike_process(cell, "scorer", "generating", signal.SIGKILL).problem == (
        "the phase was over before the strike was"
    )


def test_who_waits_for_the_one_that_is_to_be_struck_opens_nothing_once_the_plan_is_over(cell, monkeypatch):
    """The one that was to be struck may just have been, while another process held the phase open."""
    monkeypatch.setenv(phases.VARIABLE, str(cell))
    plan = json.loads((cell / "plan.json").read_text())
    monkeypatch.setattr(phases, "_await_player", lambda role: (cell / "plan.json").unlink())
    phases.linger("scorer", "generating", phases.FROM_UPDATE)
    assert not (cell / "opened.json").exists()
    (cell / "plan.json").write_text(json.dumps(plan))
    monkeypatch.setattr(phases, "_await_player", lambda role: (cell / "struck").touch())
    phases.linger("scorer", "generating", phases.FROM_UPDATE)
    assert phases.opened(cell)["phase"] == "generating"


def test_a_phase_that_nobody_enters_is_not_awaited_for_ever(cell):
    hold(cell, phase="publishing")
    assert await_phase(cell, "generating", 1.0) == {}
    assert await_phase(cell, "generating", 60.0, over=lambda: True) == {}


def test_a_disk_with_room_left_is_no_full_disk(cell, monkeypatch):
    hold(cell)
    await_phase(cell, "generating", 30)

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError

    monkeypatch.setattr("builtins.open", lambda *_, **__: Full())
    assert "blocks are still free" in fill_disk(cell, cell).problem


@pytest.mark.parametrize(
    ("opened", "problem"),
    [(False, "The strike did not land: the phase was never open."), (True, "The strike did not land: no process")],
)
def test_a_cell_whose_strike_did_not_land_fails_though_the_run_is_finished(tmp_path, monkeypatch, opened, problem):
    class Finished:
        def __init__(self, directory: Path, *_: str) -> None:
            if opened:
                (directory / "opened.json").write_text(json.dumps({"phase": "idle", "pid": os.getpid()}))

        def is_over(self) -> bool:
            return True

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(harness, "Command", Finished)
    monkeypatch.setattr(harness, "audit", lambda *given: None)
    (tmp_path / "template").mkdir()
    outcome = harness.run_cell(Cell("learner", "idle", "SIGKILL"), tmp_path / "template", tmp_path / "cell")
    assert (outcome.landed, outcome.ended) == (False, "finished")
    assert [each.startswith(problem) for each in outcome.problems] == [True]
    assert outcome.row["result"] == "FAILED"


def test_every_cell_has_a_holder_and_a_name_of_its_own():
    assert len({cell.name for cell in ALL}) == len(ALL) == 32 + 16 + 5 + 8 + 20
    assert set(FAST) <= set(ALL)
    assert {cell.holder in HOLDERS[cell.phase] for cell in ALL} == {True}


def test_the_table_keeps_other_rows_and_says_what_was_not_run():
    page = f"before\n{table.BEGIN}\n{table.END}\nafter\n"
    first = table.with_rows(page, [Outcome(ALL[0], True, "finished", 9.6, "accepted").row], "Here.", "today")
    second = table.with_rows(first, [Outcome(ALL[1], False, problems=["It did not land."]).row], "There.", "tomorrow")
    rows = table.rows_in(second)
    assert rows[ALL[0].role, ALL[0].phase, ALL[0].how][3:] == ("yes", "finished", "10", "accepted", "passed", "today")
    assert rows[ALL[1].role, ALL[1].phase, ALL[1].how][-2:] == ("FAILED", "tomorrow")
    assert [row[-2] for row in rows.values()].count("not run") == len(ALL) - 2
    assert second.startswith("before\n")
    assert second.endswith("\nafter\n")
    assert "There." in second
    assert "Here." not in second
    with pytest.raises(ValueError, match="no place for the table"):
        table.with_rows("a page", [], "", "")
