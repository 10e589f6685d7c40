"""All ranks go on from the same checkpoint or none does: what one rank does about what the other found.

Two real ranks are in test_resume_ranks.py.
"""

import pytest

from corpus.problems import RunProblem
from learners import agreed_checkpoint
from learners.agreed_checkpoint import load_agreed
from learners.checkpoint import write_checkpoint


@pytest.fixture
def other(monkeypatch):
    """What the other rank, number 1, found: a function of what this one did."""
    answers = []

    class Two:
        @staticmethod
        def get_world_size() -> int:
            return 2

        @staticmethod
        def all_gather_object(every: list, own: object) -> None:
            every[:] = [own, answers[-1](own)]

    monkeypatch.setattr(agreed_checkpoint, "dist", Two)
    return answers


def test_where_both_find_the_same_it_is_loaded(tmp_path, other):
    other.append(lambda own: own)
    assert load_agreed(tmp_path, "a") is None
    write_checkpoint(tmp_path, 3, {}, {"identity": "a"})
    found = load_agreed(tmp_path, "a")
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: (own[0], "another", False), "step-00000003-1, rank 1 from one of that name with other files"),
        (lambda own: ("no checkpoint", "", False), "from .*step-00000003-1, rank 1 from no checkpoint"),
        (lambda own: ("no checkpoint", "", True), "Rank 1 of the learners could not read the checkpoints"),
    ],
)
def test_where_the_other_finds_something_else_nothing_is_loaded(tmp_path, other, change, told):
    write_checkpoint(tmp_path, 3, {}, {"identity": "a"})
    other.append(change)
    with pytest.raises(RunProblem, match=told) as found:
        load_agreed(tmp_path, "a")
    assert found.value.code == "checkpoint/unreadable"


def test_who_cannot_read_tells_the_other_and_then_why(tmp_path, other):
    path = write_checkpoint(tmp_path, 3, {}, {"identity": "a"})
    (tmp_path / str(path) / "manifest.json").write_text("{")
    told = []
    other.append(lambda own: told.append(own) or own)
    with pytest.raises(RunProblem, match="its manifest is damaged"):
        load_agreed(tmp_path, "a")
    assert told == [("no checkpoint", "", True)]
