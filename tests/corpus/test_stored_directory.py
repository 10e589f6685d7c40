"""A directory that an object store keeps and its working copy: what travels, in which order, what a crash leaves."""

import pickle
import time

import pytest

from corpus import stored_directory
from corpus.problems import RunProblem
from corpus.stored_directory import StoredDirectory

pytest_plugins = ["tests.object_store"]


@pytest.fixture
def copies(store, query, tmp_path):
    """Makes working copies of one stored directory, by name."""

    def copy(name):
        address = f"s3://bucket/runs/one{query}"
        return StoredDirectory(address, tmp_path / name, frozenset({"checkpoints", "lock"}), frozenset({"stage.json"}))

    return copy


def fill(directory, **files):
    for name, content in files.items():
        path = directory.root / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def contents(directory):
    return {
        path.relative_to(directory.root).as_posix(): path.read_text()
        for path in sorted(directory.root.rglob("*"))
        if path.is_file() and path.name != ".stored.json"
    }


def test_what_one_machine_pushes_another_pulls(copies, keys_in):
    one, other = copies("one"), copies("other")
    fill(one, recipe="r", sft__model="m", sft__stage_json="{}", sft__checkpoints__large="c", lock="l")
    (one.root / "sft" / "half.partial").write_text("h")
    assert one.is_empty()
    assert one.push() == 3
    assert keys_in() == ["runs/one/recipe", "runs/one/sft/model", "runs/one/sft/stage.json"]
    assert (one.holds("recipe"), one.holds("sft"), one.holds("rm"), one.is_empty()) == (True, True, False, False)
    assert other.pull() == 3
    assert contents(other) == {"recipe": "r", "sft/model": "m", "sft/stage.json": "{}"}
    assert one.address_of(one.root / "sft").startswith("s3://bucket/runs/one/sft?scheme=http")
    assert pickle.loads(pickle.dumps(one)) == one


def test_only_what_changed_travels(copies, monkeypatch):
    one, other = copies("one"), copies("other")
    fill(one, a="1", b="2")
    assert (one.push(), one.push(), other.pull(), other.pull(), other.push(), one.pull()) == (2, 0, 2, 0, 0, 0)
    time.sleep(1.1)  # the store stamps objects to the second
    fill(one, a="3")  # as many bytes as before
    assert one.push() == 1
    assert other.pull() == 1
    assert contents(other) == {"a": "3", "b": "2"}
    (other.root / ".stored.json").unlink()  # nothing is known: everything travels
    assert other.pull() == 2


def test_what_is_gone_on_one_side_goes_on_the_other(copies, keys_in):
    one, other = copies("one"), copies("other")
    fill(one, a="1", deep__er__b="2")
    one.push()
    other.pull()
    (one.root / "deep" / "er" / "b").unlink()
    one.push()
    assert keys_in() == ["runs/one/a"]
    fill(other, never__stored="x", checkpoints__mine="c")
    other.pull()
    assert contents(other) == {"a": "1", "checkpoints/mine": "c"}
    assert not (other.root / "deep").exists()
    assert not (other.root / "never").exists()


def test_a_copy_that_is_ahead_or_behind_becomes_what_the_store_holds(copies):
    one, other = copies("one"), copies("other")
    fill(one, metrics="1\n")
    one.push()
    other.pull()
    fill(one, metrics="1\n2\n")
    one.push()
    fill(other, metrics="1\n2\n3\n")  # it went on, and nobody knows
    other.pull()
    assert contents(other) == {"metrics": "1\n2\n"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("arrives", range(4))
def test_a_commit_arrives_after_all_that_it_speaks_of(copies, keys_in, monkeypatch, arrives):
    one = copies("one")
    monkeypatch.setattr(stored_directory, "AT_ONCE", 1)
    fill(one, sft__a="1", sft__stage_json="{}", sft__z="2")
    count = 0
    real = stored_directory.send

    def killed(*arguments):
        nonlocal count
        if count >= arrives:
            raise Killed
        count += 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stored_directory, "send", killed)
        if arrives < 3:
            with pytest.raises(Killed):
                one.push()
        else:
            one.push()
    order = ["runs/one/sft/a", "runs/one/sft/z", "runs/one/sft/stage.json"]
    assert set(keys_in()) == set(order[:arrives])
    one.push()
    assert set(keys_in()) == set(order)


def test_a_commit_is_gone_before_what_it_speaks_of_changes(copies, keys_in, monkeypatch):
    one = copies("one")
    fill(one, sft__model="1", sft__stage_json="{}")
    one.push()
    (one.root / "sft").rename(one.root / "aside")
    fill(one, sft__model="2")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stored_directory, "send", killed)
        with pytest.raises(Killed):
            one.push()
    assert keys_in() == ["runs/one/sft/model"]
    one.push()
    assert keys_in() == ["runs/one/aside/model", "runs/one/aside/stage.json", "runs/one/sft/model"]


@pytest.mark.parametrize(("refused", "there"), [(1, []), (2, ["runs/one/sft/model"])])
def test_nothing_is_pushed_once_another_has_taken_over(copies, keys_in, refused, there):
    one = copies("one")
    fill(one, sft__model="1", sft__stage_json="{}")
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == refused:
            raise RunProblem("taken over", "run/unexpected")

    with pytest.raises(RunProblem, match="taken over"):
        one.push(check)
    assert keys_in() == there


def test_a_pull_that_was_killed_is_not_taken_for_a_whole_copy(copies, monkeypatch):
    one, other = copies("one"), copies("other")
    fill(one, sft__model="1", sft__stage_json="{}")
    one.push()

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stored_directory, "fetch", killed)
        with pytest.raises(Killed):
            other.pull()
    assert "sft/stage.json" not in contents(other)
    assert other.pull() == 2


def test_a_pull_of_some_files_leaves_out_the_rest(copies):
    one, other = copies("one"), copies("other")
    fill(one, model="1", metrics="2")
    one.push()
    assert other.pull(lambda path: path != "model") == 1
    assert contents(other) == {"metrics": "2"}


def test_a_store_that_refuses_is_one_sentence(store, query, tmp_path):
    nowhere = StoredDirectory(f"s3://nowhere/one{query}", tmp_path / "copy")
    fill(nowhere, a="1")
    with pytest.raises(RunProblem, match=r"^s3://nowhere/one could not be written \(.*the same command continues\.$"):
        nowhere.push()
