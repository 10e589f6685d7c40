"""Runs in an object store, as the machine that trains brings them there."""

from pathlib import Path
from typing import Any

from actors.published import PUBLISHED, PublishedFiles, read_published
from actors.stored_snapshots import StoredRun, StoredSnapshots
from corpus.stored_directory import StoredDirectory
from models.snapshot import Snapshot


def push(root: Path, address: str) -> None:
    """Makes the store as the working copy `root` is, but for what is published and served."""
    StoredDirectory(address, root, frozenset({PUBLISHED, "serving"}), frozenset({"stage.json"})).push()


def publish_stored(root: Path, address: str, snapshot: Snapshot, kept: int = 3) -> None:
    """Publishes a snapshot in the working copy and in the store."""
    PublishedFiles(root / PUBLISHED, "toy", kept).save(snapshot)
    one = read_published(root / PUBLISHED, snapshot.version)
    assert one is not None
    StoredSnapshots(StoredRun(address, None), "toy", kept).save(one)


def objects(store: Any, prefix: str) -> list[str]:
    """Names of the objects below a prefix, without it and without the marks of empty directories."""
    pages = store.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
    found = [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])]
    return [name for name in found if name and not name.endswith("/")]
