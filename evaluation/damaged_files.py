"""Files of a run that may be damaged: read, or told in one sentence that names the file. None where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpus.json_text import parse_json
from corpus.problems import UsageProblem


def read_text(path: Path) -> str | None:
    """The UTF-8 text of a file."""
    content = _read_bytes(path)
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageProblem(f"{path}, line {line}: this is not UTF-8 text ({error.reason}).", "run/damaged") from error


def object_in(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds."""
    text = read_text(path)
    return None if text is None else _object(text, str(path))


def objects_by_line(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of lines with their line numbers, from 1. Only the last line may be cut short."""
    lines = (_read_bytes(path) or b"").decode(errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((number, _object(line, f"{path}, line {number}")))
        except UsageProblem as problem:
            if number == len(lines) and isinstance(problem.__cause__, json.JSONDecodeError):
                break  # no newline after it: the run was stopped while it wrote this line
            raise
    return found


def yaml_mapping(path: Path, text: str) -> Mapping[str, Any]:
    """The mapping that the YAML `text` of the file `path` holds; an empty one where it holds something else."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageProblem(
            f"{path}{line}: this is not YAML ({error.problem or error.context}).", "run/damaged"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character, a date or a number that cannot be
        said = " ".join(str(error).split())
        raise UsageProblem(f"{path}: this YAML cannot be read ({said}).", "run/damaged") from error
    return found if isinstance(found, dict) else {}


def read_lengths(path: Path) -> dict[str, list[int]]:
    """Model → the lengths of its answers, tokens, of the evaluation's samples; empty where they are not kept."""
    if not path.exists():
        return {}
    try:
        table = pq.ParquetFile(path).read()
        columns = {name: table[name].to_pylist() for name in ("model", "length") if name in table.column_names}
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{path}: a text in it is not UTF-8 ({error.reason}).", "run/damaged") from error
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise UsageProblem(f"{path}: this is not a readable Parquet file ({said}).", "run/damaged") from error
    if len(columns) < 2:
        return {}
    lengths: dict[str, list[int]] = {}
    for model, length in zip(columns["model"], columns["length"], strict=True):
        if not isinstance(model, str) or not isinstance(length, int) or length < 0:
            raise UsageProblem(f"{path}: each row should have a model by name and a length in tokens.", "run/damaged")
        lengths.setdefault(model, []).append(length)
    return lengths


def finite(value: Any) -> float | None:
    """`value` as a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageProblem(f"{path}: cannot be read ({error.strerror or error}).", "run/damaged") from error


def _object(text: str, where: str) -> dict[str, Any]:
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UsageProblem(f"{where}: this is not a JSON object.", "run/damaged")
    return value
