"""Which stages need not run again, and why the others must.

A stage is known by the hash of all it reads: its settings, what its parents made, and the version of the code that
makes it. Its directory ends with stage.json, written last: that file is the commit, and a stage without it is not done.
A stage that is under way has stage.started.json instead, with the same hash, so that a later command continues only
what was begun with the same settings and parents. What a stage made is never deleted: what a change makes stale is
moved to `set-aside/` beside the stage's directory, and the caller gets the sentence that says so.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from amenable.json_files import write_json
from corpus.problems import RunProblem

STAGE_FILE = "stage.json"
STARTED_FILE = "stage.started.json"
SET_ASIDE = "set-aside"
# Raise it when a stage of this version of the program makes other outputs from the same inputs.
CODE_SCHEMA = 1
_SHOWN_CHANGES = 3


@dataclass(frozen=True)
class StageSpec:
    """A stage as the pipeline knows it before it runs.

    `directory` is where it writes; `reads` is plain JSON: every setting, seed and hash of outside data that its outputs
    depend on; `parents` are the directories of the stages whose outputs it reads.
    """

    name: str
    directory: Path
    reads: dict[str, Any]
    parents: tuple[Path, ...] = ()


class FileRecord(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size_bytes: int
    sha256: str


class StageRecord(BaseModel):
    """What stage.json says of a stage that is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stage: str
    hash: str
    code_schema: int
    reads: dict[str, Any]
    parents: dict[str, str]  # directory, relative to the stage's own, and the hash of what it holds
    files: dict[str, FileRecord]  # by path inside the stage's directory
    seconds: float
    finished: str  # ISO time in UTC
    values: dict[str, Any]  # what the stage found, for later stages and the report


@dataclass(frozen=True)
class StageState:
    """Whether a stage is done; true in a condition where it is. `record` says what it made, `why` why it is not."""

    record: StageRecord | None
    why: str

    def __bool__(self) -> bool:
        return self.record is not None


@dataclass(frozen=True)
class Beginning:
    """How a stage begins. `resumes`: its directory holds what an interrupted run with the same inputs left there.

    `why` is the sentence to show: why the stage runs, and where stale outputs went, which is `set_aside` too.
    """

    resumes: bool
    why: str
    set_aside: Path | None = None


def stage_hash(spec: StageSpec) -> str:
    """SHA-256 (hex) of all the stage reads. Raises RunProblem where a parent is not complete."""
    return _sha256_of(
        {
            "stage": spec.name,
            "code_schema": CODE_SCHEMA,
            "reads": _plain(spec.reads),
            "parents": _parent_hashes(spec),
        }
    )


def read_record(directory: Path) -> StageRecord | None:
    """stage.json of the stage in `directory`; None where there is none or it cannot be read as one."""
    try:
        return StageRecord.model_validate_json((directory / STAGE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def done(spec: StageSpec) -> StageState:
    """Whether the stage is complete, made from just this, and every file is as it was written (sizes and sha256).

    Raises RunProblem where a parent is not complete.
    """
    expected = stage_hash(spec)
    if not (spec.directory / STAGE_FILE).exists():
        return StageState(None, f"{spec.name}: not done yet")
    record = read_record(spec.directory)
    if record is None:
        return StageState(None, f"{spec.name}: its {STAGE_FILE} cannot be read")
    if record.hash != expected:
        return StageState(None, f"{spec.name}: {_what_changed(spec, record)}")
    damage = _damage(spec.directory, record)
    return StageState(None, f"{spec.name}: {damage}") if damage else StageState(record, f"{spec.name}: done before")


def begin(spec: StageSpec) -> Beginning:
    """Makes the stage's directory ready for it to run, and says why it runs.

    What an interrupted run with the same inputs left is kept, to be continued. Everything else that is in the directory
    is moved to `set-aside/` first, in one rename, so that a crash cannot leave half of it valid.
    """
    state = done(spec)
    expected = stage_hash(spec)
    started = _read_started(spec.directory)
    if not (spec.directory / STAGE_FILE).exists() and started is not None and started["hash"] == expected:
        return Beginning(True, f"{spec.name}: continues where it was interrupted.")
    why = state.why
    if not (spec.directory / STAGE_FILE).exists() and started is not None:
        changes = _changes(started["reads"], _plain(spec.reads))
        since = f"its settings changed since: {changes}" if changes else "what it reads changed since"
        why = f"{spec.name}: it was interrupted, and {since}"
    kept = _move_aside(spec)
    spec.directory.mkdir(parents=True, exist_ok=True)
    write_json(spec.directory / STARTED_FILE, {"hash": expected, "reads": _plain(spec.reads)})
    again = f"; it is run again, and what it made before is kept in {kept}." if kept else "."
    return Beginning(False, f"{why}{again}", kept)


def complete(
    spec: StageSpec,
    files: Iterable[Path],
    seconds: float,
    values: dict[str, Any],
    may_commit: Callable[[], None] = lambda: None,
) -> StageRecord:
    """Writes stage.json, which makes the stage done, after every file in `files` is safe on the disk.

    `files` are files or directories in the stage's directory; a directory stands for every file in it. They must not
    change afterwards. `may_commit` raises where this process may not write any more; it is called just before
    stage.json is written, because hashing large files takes minutes. Returns what was written. Raises RunProblem where
    a file is missing or outside the directory.
    """
    records = {}
    for path in _files_in(spec, files):
        records[path.relative_to(spec.directory).as_posix()] = FileRecord(
            size_bytes=path.stat().st_size, sha256=_sha256_of_file(path, sync=True)
        )
    record = StageRecord(
        stage=spec.name,
        hash=stage_hash(spec),
        code_schema=CODE_SCHEMA,
        reads=_plain(spec.reads),
        parents=_parent_hashes(spec),
        files=dict(sorted(records.items())),
        seconds=round(seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        values=_plain(values),
    )
    may_commit()
    write_json(spec.directory / STAGE_FILE, record.model_dump(mode="json"))
    (spec.directory / STARTED_FILE).unlink(missing_ok=True)
    return record


def _parent_hashes(spec: StageSpec) -> dict[str, str]:
    """By parent, a hash of what it holds: its own hash, files and values, not how long it took or when."""
    hashes = {}
    for parent in spec.parents:
        record = read_record(parent)
        if record is None:
            raise RunProblem(
                f"{spec.name} needs {parent.name} to be complete, but {parent} has no valid {STAGE_FILE}.",
                "stage/incomplete",
            )
        held = record.model_dump(mode="json", include={"hash", "files", "values"})
        hashes[Path(os.path.relpath(parent, spec.directory)).as_posix()] = _sha256_of(held)
    return hashes


def _what_changed(spec: StageSpec, record: StageRecord) -> str:
    changes = _changes(record.reads, _plain(spec.reads))
    if changes:
        return f"settings changed: {changes}"
    if record.code_schema != CODE_SCHEMA:
        return f"it was made by another version of the program (schema {record.code_schema}, now {CODE_SCHEMA})"
    parents = _parent_hashes(spec)
    renewed = [
        Path(parent).name
        for parent in sorted({*parents, *record.parents})
        if parents.get(parent) != record.parents.get(parent)
    ]
    if renewed:
        return f"what it reads changed: {', '.join(renewed)}"
    return f"it was made by another stage ({record.stage})"


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The settings that differ, as a person says it: "epochs 3 → 4, learning_rate added (0.001)"."""
    old, new = _flat(before), _flat(after)
    said = []
    for key in sorted({*old, *new}):
        if key not in new:
            said.append(f"{key} removed (was {_short(old[key])})")
        elif key not in old:
            said.append(f"{key} added ({_short(new[key])})")
        elif old[key] != new[key]:
            said.append(f"{key} {_short(old[key])} → {_short(new[key])}")
    more = len(said) - _SHOWN_CHANGES
    return ", ".join(said[:_SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{above}{key}."))
        else:
            flat[f"{above}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:16]}…{text[-8:]}"


def _damage(directory: Path, record: StageRecord) -> str | None:
    for name, written in record.files.items():
        path = directory / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != written.size_bytes or _sha256_of_file(path) != written.sha256:
            return f"its file {name} changed after it was written"
    return None


def _move_aside(spec: StageSpec) -> Path | None:
    """Moves all that is in the stage's directory away; returns where to, or None where it holds nothing but the mark of
    a beginning."""
    if not spec.directory.is_dir() or all(path.name == STARTED_FILE for path in spec.directory.iterdir()):
        return None
    place = spec.directory.parent / SET_ASIDE
    place.mkdir(exist_ok=True)
    label = spec.directory.name
    number = next(number for number in itertools.count(1) if not (place / f"{label}-{number}").exists())
    target = place / f"{label}-{number}"
    spec.directory.rename(target)
    return target


def _files_in(spec: StageSpec, paths: Iterable[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_relative_to(spec.directory):
            raise RunProblem(f"{spec.name}: {path} is not in its directory {spec.directory}.", "stage/incomplete")
        if not path.exists():
            raise RunProblem(
                f"{spec.name}: it should have written {path}, but there is no such file.", "stage/incomplete"
            )
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            if file.is_file() and file.name not in (STAGE_FILE, STARTED_FILE):
                found[file] = None
    return list(found)


def _read_started(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / STARTED_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) and {"hash", "reads"} <= content.keys() else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as JSON gives them back (tuples become lists), so that what was read compares equal to what is meant."""
    try:
        return json.loads(json.dumps(values, allow_nan=False, sort_keys=True))
    except ValueError:
        raise RunProblem(
            f"A stage cannot record a value that is NaN or infinite: {values!r}.", "stage/not-finite"
        ) from None


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256_of_file(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sync:
            os.fsync(stream.fileno())
    return digest
