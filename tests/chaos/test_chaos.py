"""The PPO service among strikes: whoever is struck, in whichever phase, every slot is trained exactly once."""

from pathlib import Path

import pytest
from campaign import Campaign
from cells import CAMPAIGNS, ENDS, FAST, OTHERS, Cell
from harness import Outcome, run_cell

pytestmark = pytest.mark.timeout(900)


def play(cell: Cell, template: Path, directory: Path) -> Outcome:
    try:
        return run_cell(cell, template, directory / "cell")
    except PermissionError as refused:
        pytest.skip(str(refused))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [*FAST, *(pytest.param(cell, marks=pytest.mark.extended) for cell in ENDS)], ids=lambda cell: cell.name
)
def test_the_run_is_finished_and_accepted_after_a_strike(cell, template, tmp_path):
    assert play(cell, template, tmp_path).problems == []


@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("engine", CAMPAIGNS)
def test_one_run_is_finished_and_accepted_after_strike_upon_strike(engine, template, tmp_path, played, capfd):
    def tell(outcome: Outcome) -> None:
        with capfd.disabled():
            print("\n" + " | ".join(outcome.row.values()), *outcome.problems, flush=True)

    outcomes = Campaign(CAMPAIGNS[engine], template, tmp_path / "campaign").play(tell)
    played.extend(outcomes)
    assert {outcome.cell.name: outcome.problems for outcome in outcomes if outcome.problems} == {}


@pytest.mark.chaos
@pytest.mark.parametrize("cell", OTHERS, ids=lambda cell: cell.name)
def test_the_run_is_finished_and_accepted_after_damage(cell, template, tmp_path, played):
    outcome = play(cell, template, tmp_path)
    played.append(outcome)
    assert outcome.problems == []
