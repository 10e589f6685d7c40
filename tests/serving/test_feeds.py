"""The two feeds: a weight store of this Ray cluster, and the run's files where there is none, or it is elsewhere."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.published import PUBLISHED, PublishedFiles
from models.snapshot import Snapshot, pack, unpack
from serving.feeds import KEPT, STORE_FILE, NewestOf, PublishedFeed, StoreFeed
from serving.names import Names
from tests.serving.run_on_disk import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.service]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    import ray

    from cluster.session import session

    with session(None, cpus=1):
        yield ray


def snapshot(update: int, attempt: int = 0) -> Snapshot:
    return pack({"embed": torch.full((3, 2), float(update))}, (attempt, update))


@pytest.fixture
def run(tmp_path) -> Path:
    write_recipe(tmp_path)
    (tmp_path / "round-01" / "ppo").mkdir(parents=True)
    return tmp_path


def offer(run: Path, ray: Any, name: str, **other: str) -> Any:
    """A weight store under `name`, of which the run tells as PPO's stage does."""
    from actors.weight_store import WeightStore

    store: Any = WeightStore.options(name=name).remote(None)  # pyright: ignore
    runtime = ray.get_runtime_context()
    says = {"actor": name, "namespace": runtime.namespace, "cluster": runtime.gcs_address, **other}
    (run / "round-01" / "ppo" / STORE_FILE).write_text(json.dumps(says))
    return store


def value(found: Any) -> float:
    return dict(unpack(found.snapshot.load()))["embed"].flatten()[0].item()


def test_the_store_gives_its_newest_weights_as_files(run, ray_session):
    store, feed = offer(run, ray_session, "one"), StoreFeed(Names(run))
    assert asyncio.run(feed.newest()) is None
    for update in range(KEPT + 2):
        ray_session.get(store.put.remote(snapshot(update)))
        found = asyncio.run(feed.newest())
        assert found is not None
        assert (found.version, value(found)) == (f"0.{update}", update)
        assert asyncio.run(feed.newest()) == found  # the file is there already
    files = list(found.files()[0].parent.glob("*.safetensors"))
    assert len(files) == KEPT
    feed.close()
    assert not found.files()[0].exists()
    ray_session.kill(store)


def test_a_store_of_another_cluster_is_not_asked_and_the_runs_files_are_read(run, ray_session):
    store = offer(run, ray_session, "two", cluster="10.0.0.1:6379")
    ray_session.get(store.put.remote(snapshot(9)))
    PublishedFiles(run / PUBLISHED, "a", 3).save(snapshot(5))
    names = Names(run)
    feed = NewestOf([StoreFeed(names), PublishedFeed(names)])
    found = asyncio.run(feed.newest())
    assert found is not None
    assert (found.version, value(found)) == ("0.5", 5)
    ray_session.kill(store)


def test_without_a_store_that_answers_the_runs_files_are_read(run, ray_session):
    store = offer(run, ray_session, "three")
    ray_session.get(store.put.remote(snapshot(6)))
    PublishedFiles(run / PUBLISHED, "a", 3).save(snapshot(5))
    names = Names(run)
    feed = NewestOf([StoreFeed(names), PublishedFeed(names)])
    assert asyncio.run(feed.newest()).version == "0.6"  # pyright: ignore[reportOptionalMemberAccess]
    ray_session.kill(store)
    assert asyncio.run(feed.newest()).version == "0.5"  # pyright: ignore[reportOptionalMemberAccess]


HOLDER = """
import sys, time
from pathlib import Path
from serving.feeds import StoreFeed
from serving.names import Names
feed = StoreFeed(Names(Path(sys.argv[1])))
print(feed._directory, flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_has_left_is_removed_and_what_another_has_stays(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    root = str(Path(__file__).resolve().parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        directory = Path(holder.stdout.readline().strip())
        assert directory.parent == tmp_path / "temporary"
        (directory / "0.1.safetensors").write_bytes(b"weights")
        first = StoreFeed(Names(run))
        assert directory.is_dir(), "the files of a process that lives were removed"
    finally:
        holder.kill()
        holder.wait(30)
    second = StoreFeed(Names(run))
    assert not directory.exists()
    assert len(list((tmp_path / "temporary").iterdir())) == 2
    for feed in (first, second):
        feed.close()
    assert list((tmp_path / "temporary").iterdir()) == []
