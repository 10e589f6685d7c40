"""Checkpoints: fresh directories whose manifest, written last, is the commit.

Invariants:
- A directory without a manifest, or whose files differ from it, is no checkpoint; readers pass over it.
- Nothing that a complete checkpoint holds is ever written again; a second checkpoint of a step is a new directory.
- Older checkpoints are removed only after a newer one is complete.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corpus.problems import RunProblem

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What `write_checkpoint` was given, and where it lies."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]
    tables: dict[str, pa.Table]


def write_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    data: Mapping[str, Any],
    tables: Mapping[str, pa.Table] | None = None,
    keep: int = 2,
    pinned: Collection[int] = (),
) -> Path:
    """Writes one checkpoint below `root` and returns its directory; one process of a group calls this.

    `tensors` are groups of tensors by name (one safetensors file a group), `data` is plain JSON, `tables` go to
    Parquet. Afterwards only the `keep` newest complete checkpoints remain, and those of the steps in `pinned`.
    Raises RunProblem where the disk is full or refuses; earlier checkpoints are then untouched.
    """
    directory = _fresh_directory(root, step)
    try:
        directory.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in group.items()}, directory / f"{name}.safetensors")
        for name, table in (tables or {}).items():
            pq.write_table(table, directory / f"{name}.parquet")
        (directory / "data.json").write_text(json.dumps(data, allow_nan=False))
        files = {}
        for path in sorted(directory.iterdir()):
            _flush(path)
            files[path.name] = {"sha256": _sha256(path), "size_bytes": path.stat().st_size}
        _flush(directory)
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
        _write_manifest(directory, json.dumps(manifest, indent=1))
        _flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(directory, ignore_errors=True)  # no checkpoint without a manifest, and the space is needed
        raise _problem(root, step, error) from error
    _remove_old(root, directory, keep, pinned)
    return directory


def list_complete(root: Path) -> list[Path]:
    """Directories of complete checkpoints, oldest first: a manifest, and every file of its size."""
    return [path for path in _directories(root) if _damage(path, hashes=False) is None]


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all match their hashes, or None; every newer one is named in a warning."""
    for path in reversed(_directories(root)):
        damage = _damage(path, hashes=True)
        if damage is None:
            return _load(path)
        log.warning("checkpoint %s is passed over: %s", path, damage)
    return None


def _load(path: Path) -> Checkpoint:
    return Checkpoint(
        path=path,
        step=_key(path)[0],
        tensors={file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))},
        data=json.loads((path / "data.json").read_text()),
        tables={file.stem: pq.read_table(file) for file in sorted(path.glob("*.parquet"))},
    )


def _damage(path: Path, hashes: bool) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["schema_version"], manifest["files"]
    except FileNotFoundError:
        return "it has no manifest, so it was never finished"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if version != SCHEMA_VERSION:
        return f"its schema version is {version}; this program reads {SCHEMA_VERSION}"
    for name, recorded in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != recorded["size_bytes"] or (hashes and _sha256(file) != recorded["sha256"]):
            return f"{name} is damaged"
    return None


def _remove_old(root: Path, newest: Path, keep: int, pinned: Collection[int]) -> None:
    complete = list_complete(root)
    spared = set(complete[-keep:]) | {path for path in complete if _key(path)[0] in pinned} | {newest}
    for path in _directories(root):
        if path not in spared and _key(path) < _key(newest):
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that half a removal is not a checkpoint
            shutil.rmtree(path)


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step-\d{8,}-\d+", path.name)), key=_key)


def _key(path: Path) -> tuple[int, int]:
    _, step, attempt = path.name.split("-")
    return int(step), int(attempt)


def _fresh_directory(root: Path, step: int) -> Path:
    taken = [_key(path)[1] for path in _directories(root) if _key(path)[0] == step]
    return root / f"step-{step:08d}-{max(taken, default=0) + 1}"


def _write_manifest(directory: Path, text: str) -> None:
    with open(directory / MANIFEST, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _problem(root: Path, step: int, error: Exception) -> RunProblem:
    written = re.search(r"os error (\d+)", str(error))  # safetensors tells the number only in its text
    number = error.errno if isinstance(error, OSError) else int(written[1]) if written else None
    reason = "the disk is full" if number in FULL_DISK else str(error)
    return RunProblem(f"{root}: the checkpoint of step {step} was not written: {reason}; earlier ones are intact.")
