"""`amenable scale`: what it asks for, what it refuses, and what it tells."""

import json
import os

import pytest
from typer.testing import CliRunner

from actors import desired
from actors.desired import LOCK_FILE, read_desired, write_fleet
from amenable.cli import app
from corpus.file_lock import file_lock


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "round-01" / "ppo").mkdir(parents=True)
    return tmp_path


def command(*words: str):
    return CliRunner().invoke(app, ["scale", *words])


def test_a_wish_is_written_where_the_conductor_reads_it_and_counted(run):
    for counter, generators in ((1, 4), (2, 1)):
        found = command(str(run), f"generators={generators}", "--json")
        assert found.exit_code == 0, found.output
        wish = read_desired(run / "round-01" / "ppo")
        assert wish is not None
        assert (wish.counter, wish.generators) == (counter, generators)
        assert json.loads(found.stdout)["wish"]["who"] == wish.who


def test_without_a_wish_it_tells_who_there_is(run):
    assert "Nothing else than the recipe was asked for." in command(str(run)).stdout
    write_fleet(
        run / "round-01" / "ppo",
        {
            "counter": 0,
            "workers": {"generator-0": "healthy", "generator-1": "restarting"},
            "waiting": ["generator-1 waits for a bundle of 1 CPU, which the cluster has not free"],
            "problem": "",
        },
    )
    told = command(str(run)).stdout
    assert "Last seen: generator-0 healthy, generator-1 restarting." in told
    assert "generator-1 waits for a bundle of 1 CPU, which the cluster has not free." in told
    assert read_desired(run / "round-01" / "ppo") is None


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("generators=0", "generators=0 should be a whole number above 0"),
        ("generators=two", "generators=two should be a whole number above 0"),
        ("generators", "'generators' cannot be scaled; give generators=N"),
        ("learners=2", "'learners=2' cannot be scaled; give generators=N"),
    ],
)
def test_a_wrong_wish_is_refused(run, wish, told):
    found = command(str(run), wish)
    assert found.exit_code == 2
    assert told in found.output
    assert read_desired(run / "round-01" / "ppo") is None


def test_a_wish_whose_lock_nobody_lets_go_of_is_told_with_who_holds_it(run, monkeypatch):
    monkeypatch.setattr(desired, "LOCK_DEADLINE_S", 0.1)
    with file_lock(run / "round-01" / "ppo" / LOCK_FILE, 1.0):
        found = command(str(run), "generators=2")
    assert found.exit_code == 2
    assert f"by process {os.getpid()} on" in found.output.replace("\n", " ")
    assert read_desired(run / "round-01" / "ppo") is None


def test_a_run_that_has_not_come_to_ppo_or_is_through_it_is_refused(run):
    (run / "round-01" / "ppo").rmdir()
    found = command(str(run), "generators=2")
    assert (found.exit_code, "has not come to PPO yet" in found.output) == (2, True)
    found = command(str(run / "nowhere"), "generators=2")
    assert (found.exit_code, "There is no run in" in found.output) == (2, True)
