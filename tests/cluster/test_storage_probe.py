"""What a run asks of its storage is tried, and each operation that does not work is told by its name."""

import fcntl
import os
from pathlib import Path

import pytest

from cluster import doctor
from cluster.doctor import try_here
from cluster.storage_probe import DRIVERS, NOT_TRIED, probe, seen

pytest_plugins = ["tests.object_store"]


def test_a_sound_directory_passes_every_operation_and_is_left_with_the_nodes_file_alone(tmp_path):
    found = probe(str(tmp_path), "n1", "nonce")
    assert found == dict.fromkeys(
        ["exclusive creation", "locks", "write", "fsync", "read back", "rename", "listing", "removal"], ""
    )
    assert [path.name for path in tmp_path.iterdir()] == ["n1"]
    assert seen(str(tmp_path), "n1", "nonce") == ""
    assert seen(str(tmp_path), "n1", "another") == "its content is another"
    assert seen(str(tmp_path), "n2", "nonce") == "it is not there"


def fails(*_, **__):
    raise OSError("not here")


@pytest.mark.parametrize(
    ("module", "function", "stand_in", "operation", "says"),
    [
        (os, "fsync", fails, "fsync", "not here"),
        (os, "replace", fails, "rename", "not here"),
        (os, "replace", lambda source, target: None, "rename", "a renamed file is not what it was"),
        (os, "listdir", lambda path: [], "listing", "the listing is [], not ['claim']"),
        (fcntl, "flock", fails, "locks", "not here"),
        (fcntl, "flock", lambda stream, kind: None, "locks", "a locked file was locked again"),
        (Path, "read_bytes", lambda self: b"other", "read back", "what was read is not what was written"),
        (Path, "mkdir", fails, "exclusive creation", "not here"),
        (Path, "rmdir", fails, "removal", "not here"),
    ],
)
def test_an_operation_that_does_not_work_is_told_and_what_follows_is_not_tried(
    tmp_path, monkeypatch, module, function, stand_in, operation, says
):
    monkeypatch.setattr(module, function, stand_in)
    found = probe(str(tmp_path), "n1", "nonce")
    monkeypatch.undo()
    assert found[operation].startswith(says)
    names = list(found)
    assert all(found[name] == "" for name in names[: names.index(operation)])
    assert all(found[name] == NOT_TRIED for name in names[names.index(operation) + 1 :])


def test_a_creation_that_is_not_exclusive_is_seen(tmp_path, monkeypatch):
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: plain(path, flags & ~os.O_EXCL, mode))
    assert probe(str(tmp_path), "n1", "nonce")["exclusive creation"] == "a file was created twice"


def test_the_doctor_leaves_nothing_behind_and_makes_no_run(tmp_path):
    place = tmp_path / "runs" / "x"
    found = try_here(str(place))
    assert (found.state, found.says[-17:]) == ("ok", ", from every node")
    assert list(tmp_path.iterdir()) == []
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text("name: x")
    assert try_here(str(place)).state == "ok"
    assert [path.name for path in place.iterdir()] == ["recipe.yaml"]


def test_a_place_that_cannot_be_written_to_fails(tmp_path):
    (tmp_path / "file").write_text("")
    found = try_here(str(tmp_path / "file" / "run"))
    assert found.state == "failed"
    assert "it cannot be written to from here (" in found.says


def test_nodes_that_see_another_disk_are_told(tmp_path):
    """Two nodes mount a disk of their own at the path: one has the directory and other files, one has nothing there."""

    def ask(trial, nonce):
        other = tmp_path / "other"
        other.mkdir()
        return {
            "n1": doctor._try_storage(trial, "n1", nonce),
            "n2": doctor._try_storage(str(other), "n2", nonce),
            "n3": doctor._try_storage(str(tmp_path / "nothing"), "n3", nonce),
        }, {}

    found = doctor._examined(str(tmp_path / "run"), {"n1": "n1", "n2": "n2", "n3": "n3"}, ask)
    assert found.state == "failed"
    assert "seen from or by n2 (it is not there), n3 (it is not there); mount the same disk" in found.says


def test_a_node_whose_file_the_driver_does_not_see_is_told(tmp_path):
    def ask(trial, nonce):
        tried, theirs = doctor._try_storage(trial, "n1", nonce)
        (Path(trial) / "n1").unlink()
        return {"n1": (tried, theirs)}, {}

    found = doctor._examined(str(tmp_path / "run"), {"n1": "n1"}, ask)
    assert (found.state, "by n1 (it is not there)" in found.says) == ("failed", True)


@pytest.fixture
def address(store, query):
    """Addresses in an empty bucket."""
    return lambda name: f"s3://bucket/{name}{query}"


def test_an_object_store_is_tried_with_what_it_has(address, keys_in):
    found = try_here(address("runs/one"))
    assert keys_in() == []
    assert found.state == "ok", found
    assert found.says.endswith(": write, read back, listing, time stamp, removal, from every node")
    assert "?" not in found.says
    store = address("direct")
    assert seen(store, DRIVERS, "nonce") == "it is not there"
    assert set(probe(store, "n1", "nonce").values()) == {""}
    assert seen(store, "n1", "nonce") == ""


def test_an_object_store_whose_listing_lags_fails(address, monkeypatch):
    from pyarrow import fs

    class Lagging:
        def __init__(self, filesystem):
            self._filesystem = filesystem

        def __getattr__(self, name):
            return getattr(self._filesystem, name)

        def get_file_info(self, what):
            return [] if isinstance(what, fs.FileSelector) else self._filesystem.get_file_info(what)

    from cluster import storage_probe

    plain = storage_probe.opened
    monkeypatch.setattr(storage_probe, "opened", lambda place: (Lagging(plain(place)[0]), plain(place)[1]))
    found = probe(address("lagging"), "n1", "nonce")
    assert found["listing"].startswith("a listing does not show what was just written")
