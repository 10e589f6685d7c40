"""Room is waited for where it can come, with a deadline that says what is pending; else it is told at once."""

import pytest

from cluster import doctor
from cluster.capacity import Capacity
from cluster.doctor import await_room
from cluster.packing import Bundle, Room
from cluster.room import NodeGroup

ASKED = [Bundle("learner", 4)]
FREE = Room("a", 8, 0, 8, 0)
BUSY = Room("a", 1, 0, 8, 0)
SMALL = Room("a", 2, 0, 2, 0)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(doctor, "LOOK_S", 0.001)


def waited(*rooms: Room, groups=None, freed_s: float = 30.0, scaled_s: float = 30.0):
    """The finding where the cluster shows these rooms one after another, what was noted, asked, and how often it was
    looked at."""
    shown, notes, asked, looks = list(rooms), [], [], []

    def look(meanwhile):
        looks.append(1)
        return Capacity({"1": shown.pop(0) if len(shown) > 1 else shown[0]}, groups)

    found = await_room(ASKED, notes.append, lambda: None, freed_s, scaled_s, look, asked.append)
    return found, notes, asked, len(looks)


def test_room_that_is_there_is_not_waited_for():
    found, notes, asked, looks = waited(FREE)
    assert (found.state, notes, asked, looks) == ("ok", [], [], 1)


def test_room_that_never_can_be_is_told_at_once():
    found, _, asked, looks = waited(SMALL)
    assert (found.state, asked, looks) == ("failed", [], 1)
    assert "no node is that large" in found.says


def test_room_that_others_take_is_waited_for_and_noted_once():
    found, notes, asked, looks = waited(BUSY, BUSY, FREE)
    assert (found.state, asked, looks) == ("ok", [], 3)
    assert len(notes) == 1


def test_room_that_stays_taken_is_told_with_what_is_pending():
    found, _, _, _ = waited(BUSY, freed_s=0.02)
    assert found.state == "failed"
    assert found.says.endswith("these still wait for room: 1 learner (4 CPUs)")


def test_an_autoscaler_is_asked_once_waited_for_and_released():
    found, notes, asked, _ = waited(SMALL, SMALL, FREE, groups=(NodeGroup("big", 8, 0, 2),))
    assert found.state == "ok"
    assert asked == [ASKED, []]
    assert notes == ["waiting for room: unknown until scaled: 1 learner (4 CPUs) wait for nodes to be added"]


def test_nodes_that_do_not_come_are_told_with_what_is_pending_and_the_wish_is_withdrawn():
    found, _, asked, _ = waited(SMALL, groups=(), scaled_s=0.02)
    assert found.state == "failed"
    assert "these still wait for room: 1 learner (4 CPUs)" in found.says
    assert asked[-1] == []


def test_a_stop_that_is_asked_for_ends_the_wait():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        await_room(ASKED, lambda text: None, stop, look=lambda meanwhile: Capacity({"1": BUSY}, None))


def test_an_autoscaler_is_asked_for_nodes_with_the_labels_of_each_bundle(monkeypatch):
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **given: asked.append(given))
    bundles = [Bundle("learner", 4, 1, 2, frozenset({("pool", "a")})), Bundle("scoring", 1)]
    shown = [SMALL, SMALL, Room("a", 16, 2, 16, 2, frozenset({("pool", "a")}))]
    look = lambda meanwhile: Capacity({"1": shown.pop(0)}, ())  # noqa: E731
    assert await_room(bundles, lambda text: None, lambda: None, look=look).state == "ok"
    assert asked == [
        {"bundles": [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0}], "bundle_label_selectors": [{"pool": "a"}, {}]},
        {"bundles": [], "bundle_label_selectors": []},
    ]
