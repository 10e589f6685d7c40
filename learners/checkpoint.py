"""Checkpoints: fresh directories whose manifest, written last, is the commit; on a local disk or in an object store.

Invariants:
- A directory without a manifest, or whose files differ from it, is no checkpoint; readers pass over it.
- Nothing that a complete checkpoint holds is ever written again; a second checkpoint of a step is a new directory.
- Older checkpoints are removed only after a newer one is complete, each one's manifest before its files.
- Nothing is renamed: object stores cannot.
"""

import errno
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corpus.problems import RunProblem
from corpus.storage import one_line
from learners.checkpoint_place import CheckpointPlace, Damaged, Root, Unfinished, key

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What `write_checkpoint` was given, and where it lies: a path, or an address in an object store."""

    path: Path | str
    step: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]
    tables: dict[str, pa.Table]
    manifest_sha256: str = ""
    """SHA-256 (hex) of what its manifest says of its files."""
    passed_over: frozenset[str] = frozenset()
    """Names of newer ones that cannot be read, of which `write_checkpoint` is to know."""


def write_checkpoint(
    root: Root,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    data: Mapping[str, Any],
    tables: Mapping[str, pa.Table] | None = None,
    keep: int = 2,
    pinned: Collection[int] = (),
    unreadable: Collection[str] = (),
    may_commit: Callable[[], None] = lambda: None,
) -> Path | str:
    """Writes one checkpoint below `root` and returns its path or address; one process of a group calls this.

    `tensors` are groups of tensors by name (one safetensors file a group), `data` is plain JSON, `tables` go to
    Parquet. Afterwards only the `keep` newest complete checkpoints remain, those of the steps in `pinned`, those in
    whose directory a person put a file named `pinned`, and those of another version of the program; those known to be
    `unreadable`, by name, are not counted. `may_commit` raises where this process may not write any more; it is called
    just before the manifest is written, because large files take minutes. Raises RunProblem where the disk is full, or
    disk or store refuses; earlier checkpoints are then untouched.
    """
    place = CheckpointPlace(root)
    name = place.fresh(step)
    try:
        with place.write(name, may_commit) as directory:
            for group, each in tensors.items():
                contiguous = {key: tensor.contiguous() for key, tensor in each.items()}
                save_file(contiguous, directory / f"{group}.safetensors")
            for table, rows in (tables or {}).items():
                pq.write_table(rows, directory / f"{table}.parquet")
            (directory / "data.json").write_text(json.dumps(data, allow_nan=False))
    except (OSError, SafetensorError) as error:
        raise _problem(place, step, error) from error
    place.remove_old(name, keep, pinned, unreadable)
    return place.address(name)


def list_complete(root: Root) -> list[Path | str]:
    """Paths or addresses of complete checkpoints, oldest first: a manifest, and every file of its size."""
    place = CheckpointPlace(root)
    return [place.address(name) for name in place.complete()]


def load_newest(root: Root, identity: str | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files all match their hashes; every newer one is named in a warning, with what is
    wrong. With an `identity` only those count whose data have it. None where there never was one, or all are of another
    identity.

    Raises RunProblem where a store does not answer, or where there are checkpoints and what would be gone on from
    cannot be read: neither is the same as holding none.
    """
    place = CheckpointPlace(root)
    damages: dict[str, Damaged] = {}
    for name in reversed(place.names()):
        try:
            with place.read(name) as directory:
                data = json.loads((directory / "data.json").read_text())
                if identity is not None and data.get("identity") != identity:
                    continue
                return Checkpoint(
                    path=place.address(name),
                    step=key(name)[0],
                    tensors={file.stem: load_file(file) for file in sorted(directory.glob("*.safetensors"))},
                    data=data,
                    tables={file.stem: pq.read_table(file) for file in sorted(directory.glob("*.parquet"))},
                    manifest_sha256=place.content_of(name),
                    passed_over=frozenset(damages),
                )
        except Damaged as damage:
            log.warning("checkpoint %s is passed over: %s", place.named(name), damage)
            if not isinstance(damage, Unfinished):
                damages[name] = damage
    if damages:
        told = "; ".join(f"{name}: {damage}" for name, damage in damages.items())
        raise RunProblem(
            f"{place.named()}: there are checkpoints, but none that can be gone on from ({told}); put back what is "
            "named, or use the version of the program that wrote it, and the same command continues; to begin the "
            f"stage anew on purpose, remove {place.named()} first.",
            "checkpoint/unreadable",
        )
    return None


def _problem(place: CheckpointPlace, step: int, error: Exception) -> RunProblem:
    written = re.search(r"os error (\d+)", str(error))  # safetensors tells the number only in its text
    number = error.errno if isinstance(error, OSError) else int(written[1]) if written else None
    reason = "the disk is full" if number in FULL_DISK else one_line(error)
    told = f"the checkpoint of step {step} was not written: {reason}; earlier ones are intact."
    return RunProblem(f"{place.named()}: {told}", "checkpoint/write")
