"""The audit log loses nothing, changes nothing, and holds no secret."""

import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from corpus import audit_log
from corpus.audit_log import FILE, PINNED, SCALED, Entry, actor_here, add, audited, entry_now, read
from corpus.problems import RunProblem, UsageProblem

pytest_plugins = ["tests.object_store"]

HUGGING_FACE = "hf_" + "aB3" * 8

WRITER = """
import sys
from corpus.audit_log import add, entry_now
for number in range(int(sys.argv[3])):
    add(sys.argv[1], entry_now("scaled", {"writer": sys.argv[2], "number": number, "filler": "x" * 3000}))
"""

GROUP = 64000
AS_USER = """
import os, sys
from corpus.audit_log import add, entry_now
user, group, umask, place = sys.argv[1:]
os.umask(int(umask, 8))
os.chdir(place)
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
add(".", entry_now("scaled", {}))
"""
"""Adds an entry as USER of GROUP with UMASK to the log in PLACE. What it imports is read as root, and PLACE is entered
as root, because what lies above it is root's alone."""


def written_at_once(place: str, writers: int, each: int) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, place, str(writer), str(each)], cwd=Path(__file__).parents[2])
        for writer in range(writers)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * writers


def test_two_writers_at_once_lose_nothing(tmp_path):
    written_at_once(str(tmp_path), writers=2, each=60)
    entries, unreadable = read(tmp_path)
    assert unreadable == 0
    assert {(entry.asked["writer"], entry.asked["number"]) for entry in entries} == {
        (str(writer), number) for writer in range(2) for number in range(60)
    }


def test_what_is_written_stays_as_it_was(tmp_path):
    add(tmp_path, entry_now(SCALED, {"generators": 2}))
    before = (tmp_path / FILE).read_bytes()
    add(tmp_path, entry_now(SCALED, {"generators": 3}))
    after = (tmp_path / FILE).read_bytes()
    assert after.startswith(before)
    assert [entry.asked["generators"] for entry in read(tmp_path)[0]] == [2, 3]


def test_a_line_that_was_cut_short_stays_alone(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"schema_version": 1, "time": "20')
    add(tmp_path, entry_now(SCALED, {"generators": 3}))
    entries, unreadable = read(tmp_path)
    assert ([entry.asked for entry in entries], unreadable) == ([{"generators": 3}], 1)


def test_an_entry_says_who_did_what_when_and_what_came_of_it(tmp_path):
    with audited(tmp_path, PINNED, {"version": "policy@3"}, token_name="ops") as asking:
        asking.outcome = "done, as wish 4"
    ((entry,), _) = read(tmp_path)
    assert (entry.actor, entry.action, entry.token_name) == (actor_here(), PINNED, "ops")
    assert (entry.asked, entry.outcome) == ({"version": "policy@3"}, "done, as wish 4")
    assert "@" in entry.actor
    assert entry.time.endswith("+00:00")


@pytest.mark.parametrize(
    ("problem", "verb"),
    [(UsageProblem("No.", "run/unexpected"), "refused"), (RunProblem("No.", "run/unexpected"), "failed")],
)
def test_what_was_refused_or_went_wrong_is_an_entry_too(tmp_path, problem, verb):
    with pytest.raises(type(problem)), audited(tmp_path, SCALED, {}):
        raise problem
    assert [entry.outcome for entry in read(tmp_path)[0]] == [f"{verb}: No."]


@pytest.mark.parametrize(
    ("asked", "left_out"),
    [
        ({"overrides": [f"model.base={HUGGING_FACE}"]}, HUGGING_FACE),
        ({"access_token": "open sesame"}, "open sesame"),
        ({"why": "because of zq7-canary-4b1f"}, "zq7-canary-4b1f"),
    ],
)
def test_a_secret_is_left_out_and_said_to_be(tmp_path, asked, left_out):
    add(tmp_path, entry_now(SCALED, asked, outcome=f"said {left_out}"), {"SOME_TOKEN": "zq7-canary-4b1f"})
    text = (tmp_path / FILE).read_text()
    assert (left_out in text) == ("sesame" in left_out)  # by its name alone it is known where the name stands
    assert "left out" in text
    assert left_out not in json.dumps(read(tmp_path)[0][0].asked)


def test_what_is_no_secret_is_kept(tmp_path):
    asked = {"overrides": ["tokens.max_prompt_tokens=64", "seed=7"], "generators": 4, "fresh": None}
    add(tmp_path, entry_now(SCALED, asked), {"SOME_TOKEN": "zq7-canary-4b1f"})
    assert read(tmp_path)[0][0].asked == asked


def test_an_entry_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(RunProblem, match="the entry 'scaled' could not be written to its audit log"):
        add(tmp_path / "nowhere", entry_now(SCALED, {}))


@pytest.mark.parametrize("action", [PINNED, SCALED])
def test_where_only_the_entry_is_missing_it_is_said_that_the_work_is_done(tmp_path, action):
    os.mkdir(tmp_path / FILE)
    is_done = False
    with pytest.raises(RunProblem) as caught, audited(tmp_path, action, {}):
        is_done = True
    assert is_done
    assert caught.value.code == "storage/audit-log"
    told = f"The run was {action}, and need not be {action} again; only the entry of it is missing. {tmp_path}: "
    assert str(caught.value).startswith(told)
    assert "Is a directory" in str(caught.value)


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644)])
def test_the_umask_says_who_else_may_append(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        add(tmp_path, entry_now(SCALED, {}))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == mode


@pytest.mark.skipif(os.getuid() != 0, reason="to become two users of one group takes root")
@pytest.mark.parametrize(("umask", "may"), [("002", True), ("022", False)])
def test_a_second_user_of_a_shared_group_directory_appends_where_the_umask_lets_the_group(tmp_path, umask, may):
    shared = tmp_path / "run"
    shared.mkdir()
    os.chown(shared, 0, GROUP)
    shared.chmod(0o2775)
    ends = [
        subprocess.run(
            [sys.executable, "-c", AS_USER, str(user), str(GROUP), umask, str(shared)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        for user in (64001, 64002)
    ]
    assert ends[0].returncode == 0, ends[0].stderr
    assert (ends[1].returncode == 0) == may, ends[1].stderr
    assert ("Permission denied" in ends[1].stderr) != may
    assert len(read(shared)[0]) == (2 if may else 1)


def test_a_log_that_is_none_is_told_and_an_empty_one_is_empty(tmp_path):
    assert read(tmp_path) == ([], 0)
    os.mkdir(tmp_path / FILE)
    with pytest.raises(RunProblem, match="cannot be read"):
        read(tmp_path)


def test_in_an_object_store_every_entry_is_an_object_that_stays(store, query, keys_in):
    place = f"s3://bucket/runs/x{query}"
    first = entry_now(SCALED, {"generators": 2, "note": HUGGING_FACE})
    add(place, first)
    (name,) = keys_in("runs/x/")
    before = store.get_object(Bucket="bucket", Key=name)["Body"].read()
    add(place, first)  # of the same moment
    add(place, entry_now(SCALED, {"generators": 3}))
    assert len(keys_in("runs/x/audit-log/")) == 3
    assert store.get_object(Bucket="bucket", Key=name)["Body"].read() == before
    entries, unreadable = read(place)
    assert ([entry.asked["generators"] for entry in entries], unreadable) == ([2, 2, 3], 0)
    assert HUGGING_FACE.encode() not in before
    assert isinstance(entries[0], Entry)


def test_where_neither_the_work_nor_its_entry_can_be_done_the_work_is_told_of(tmp_path):
    with pytest.raises(RunProblem, match=r"^The store is away\.") as caught, audited(tmp_path / "gone", "pinned", {}):
        raise RunProblem("The store is away.", "storage/write")
    (note,) = caught.value.__notes__
    assert "the entry 'pinned' could not be written to its audit log" in note
    assert "need not" not in note


def test_a_lock_that_is_not_given_back_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_log, "LOCK_S", 0.1)
    with open(tmp_path / FILE, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunProblem, match=r"another process has held its lock for 0\.1 s"):
            add(tmp_path, entry_now(PINNED, {}))
    add(tmp_path, entry_now(PINNED, {}))
    assert len(read(tmp_path)[0]) == 1
