"""A campaign tells a strike that was recovered from apart from one that was not; processes stand in for roles."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import campaign
import harness
import phases
import pytest
from campaign import Campaign
from cells import CAMPAIGNS, KILLS, REAL, STALE, STOPS, Cell
from harness import end_processes

RUN = """
import os, subprocess, sys, time, phases
# The command: a worker, which is made anew if it "recovers", and a checkpoint now and then, one more where it ends. One
# that "sticks" saves nothing when it is given again.
role, recovers = sys.argv[1], sys.argv[2] == "recovers"
worker = subprocess.Popen([sys.executable, "-c", sys.argv[3], role])
phases.register("driver")
checkpoints = phases.cell_directory() / "saved"
saved = int(checkpoints.read_text()) if checkpoints.exists() else 2
if checkpoints.exists() and sys.argv[2] == "sticks":
    time.sleep(60)
while saved < 400:
    if worker.poll() is not None or phases.is_stopped(worker.pid):
        if not recovers:
            checkpoints.write_text(str(saved + 1))
            sys.exit("The worker is gone. [run/process-died]")
        worker.kill()
        worker.wait()
        worker = subprocess.Popen([sys.executable, "-c", sys.argv[3], role])
    saved += 1
    checkpoints.write_text(str(saved))
    time.sleep(0.1)
"""

WORKER = """
import sys, time, phases
phases.register(sys.argv[1])
while True:
    phases.linger(sys.argv[1], "generating", phases.FROM_UPDATE)
    time.sleep(0.01)
"""


class StandIn:
    """A command whose one worker is replaced where it is gone ("recovers"), or which ends then, with a sentence."""

    started: ClassVar[list["StandIn"]] = []

    def __init__(self, directory: Path, role: str, does: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
        given = {**os.environ, phases.VARIABLE: str(directory), "PYTHONPATH": path}
        line = [sys.executable, "-c", RUN, role, does, WORKER]
        self._process = subprocess.Popen(line, env=given, stderr=subprocess.PIPE, text=True)
        self.said = self.sentence = "The worker is gone. [run/process-died]"
        self.started.append(self)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int | None:
        return self._process.wait(60)


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Plays cells on a stand-in, whose workers serve if `serves`."""
    (tmp_path / "template").mkdir()
    saved = tmp_path / "campaign" / "saved"
    monkeypatch.setattr(campaign, "RECOVERY_S", 6.0)
    monkeypatch.setattr(campaign, "audit", lambda *given: None)
    monkeypatch.setattr(campaign, "audit_so_far", lambda *given: None)
    monkeypatch.setattr(campaign, "newest_checkpoint", lambda run: int(saved.read_text() or 0) if saved.exists() else 0)

    def played(cells: list[Cell], does: str, serves: bool = True):
        start = lambda self: StandIn(self._directory, cells[0].role, does)  # noqa: E731
        monkeypatch.setattr(Campaign, "_serves", lambda self: serves)
        monkeypatch.setattr(Campaign, "_start", start)
        monkeypatch.setattr(campaign, "end_processes", lambda directory: [])
        made = Campaign(cells, tmp_path / "template", tmp_path / "campaign")
        try:
            for outcome in made._outcomes:
                made._play(outcome)
        finally:
            for each in StandIn.started:
                each._process.kill()
            end_processes(tmp_path / "campaign", patience_s=0)
        return made._outcomes

    return played


def test_a_worker_that_is_replaced_is_recovered_from_strike_after_strike(play):
    outcomes = play([Cell("scorer", "generating", "SIGKILL"), Cell("scorer", "generating", "SIGSTOP")], "recovers")
    assert [(each.landed, each.ended, each.problems) for each in outcomes] == [(True, "went on", [])] * 2


def test_a_command_that_ends_by_a_worker_s_death_has_failed_the_cell(play):
    [outcome] = play([Cell("scorer", "generating", "SIGKILL")], "ends")
    assert (outcome.landed, outcome.ended) == (True, "stopped")
    assert outcome.problems == ["The command was to survive this, and ended: The worker is gone. [run/process-died]"]


def test_a_worker_that_is_there_again_and_does_not_serve_has_failed_the_cell(play):
    [outcome] = play([Cell("scorer", "generating", "SIGKILL")], "recovers", serves=False)
    assert outcome.problems == ["No other scorer served within 6 s of the strike."]


def test_a_command_that_ends_and_goes_on_when_it_is_given_again_is_resumed(play):
    [outcome] = play([Cell("stream", "generating", "SIGKILL")], "ends")
    assert (outcome.landed, outcome.ended, outcome.problems) == (True, "stopped, resumed", [])


def test_a_run_that_the_audit_does_not_accept_when_its_command_has_ended_has_failed_the_cell(play, monkeypatch):
    monkeypatch.setattr(campaign, "audit_so_far", harness.audit_so_far)
    [outcome] = play([Cell("stream", "generating", "SIGKILL")], "ends")
    assert len(outcome.problems) == 1
    assert outcome.problems[0].startswith("The audit could not be made when the command had ended: ")


def test_what_the_command_that_ends_still_saves_does_not_count_as_going_on(play):
    [outcome] = play([Cell("stream", "generating", "SIGKILL")], "sticks")
    assert outcome.landed
    assert [each.partition(":")[0] for each in outcome.problems] == ["The same command again saved nothing"]


def test_a_phase_that_is_never_open_fails_its_cell(play):
    [outcome] = play([Cell("scorer", "publishing", "SIGKILL")], "recovers")
    assert outcome.problems[0] == "The strike did not land: the phase was never open."


def test_a_process_that_comes_late_to_an_earlier_plan_opens_nothing(play, monkeypatch):
    late = {"role": "scorer", "phase": "publishing", "pid": 1, "at": 0.0, "number": 7}
    start = Campaign._let_go_on
    monkeypatch.setattr(
        Campaign,
        "_let_go_on",
        lambda self, updates: (start(self, updates), phases.write_new(self._directory / "opened.json", late)),
    )
    [outcome] = play([Cell("scorer", "generating", "SIGKILL")], "recovers")
    assert (outcome.landed, outcome.problems) == (True, [])


def test_an_earlier_phase_that_is_over_only_now_says_nothing_of_a_later_one(play, monkeypatch):
    start = Campaign._let_go_on
    monkeypatch.setattr(
        Campaign,
        "_let_go_on",
        lambda self, updates: (start(self, updates), phases.closed(self._directory, 7).touch()),
    )
    [outcome] = play([Cell("scorer", "generating", "SIGKILL")], "recovers")
    assert (outcome.landed, outcome.problems) == (True, [])


def test_campaigns_play_every_kill_and_stop_once():
    assert {"torch": [*KILLS, *STOPS], "vLLM": REAL, "staleness 1": STALE} == CAMPAIGNS
    assert all(cell.stale for cell in STALE)
    assert {cell.role for cell in STALE} == {cell.role for cell in KILLS}
