"""Raw rows from files: JSONL, JSON, Parquet and text, gzip or not, local or in an object store; or from the Hub.

Every row comes with its place ("file:line"), which errors about it name.
"""

import fnmatch
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from corpus.hub import HUB, hub_card, name_and_split
from corpus.json_text import parse_json, unreadable_json
from corpus.problems import UsageProblem
from corpus.storage import named, one_line, resolve

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")
_WILD = "*?["
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


class RawRow(NamedTuple):
    """One row as it was found: where ("file:line", "file, row 7") and its columns."""

    place: str
    columns: dict[str, Any]


def read_rows(address: str | os.PathLike[str]) -> Iterator[RawRow]:
    """The rows at `address`, in order.

    `address` is a file, a directory (all data files in it and below, by name), or a glob, each local or s3://… or
    gs://…; or "hub:NAME" or "hub:NAME:SPLIT" for a dataset of the Hugging Face Hub (split "train" unless given).
    A text file gives its blocks between empty lines as rows with a `text` column.

    Raises UsageProblem where nothing is there, or a row is malformed (naming file and line).
    """
    text = str(address)
    if text.startswith(HUB):
        yield from _hub_rows(text)
        return
    filesystem, paths = find_files(text)
    for path in paths:
        yield from _file_rows(filesystem, path, named(text, path))


def find_files(address: str) -> tuple[fs.FileSystem, list[str]]:
    """The data files that `address` (file, directory or glob) stands for, sorted. UsageProblem where there are none."""
    filesystem, inner = resolve(address)
    kinds = ", ".join(SUFFIXES)
    if any(character in inner for character in _WILD):
        fixed = inner[: min(inner.index(character) for character in _WILD if character in inner)].rpartition("/")[0]
        found = [path for path in _files_below(filesystem, fixed, address) if fnmatch.fnmatch(path, inner)]
        if not found:
            raise UsageProblem(f"{address}: no file matches.", "data/not-found")
        unreadable = [path for path in found if not path.endswith(SUFFIXES)]
        if unreadable:
            raise UsageProblem(
                f"{named(address, unreadable[0])}: not a data file ({kinds}), though {address} matches it.",
                "data/file-kind",
            )
        return filesystem, found
    try:
        info = filesystem.get_file_info(inner)
    except (OSError, ValueError) as error:  # ValueError: an object store's path with an empty part
        raise UsageProblem(f"{address}: cannot be reached ({one_line(error)}).", "data/unreadable") from error
    if info.type == fs.FileType.Directory:
        found = [path for path in _files_below(filesystem, inner, address) if path.endswith(SUFFIXES)]
        if not found:
            raise UsageProblem(f"{address}: there is no data file ({kinds}) in this directory.", "data/not-found")
        return filesystem, found
    if info.type == fs.FileType.NotFound:
        raise UsageProblem(f"{address}: there is no such file or directory.", "data/not-found")
    if not inner.endswith(SUFFIXES):
        raise UsageProblem(f"{address}: not a data file; the name should end in one of {kinds}.", "data/file-kind")
    return filesystem, [inner]


def _files_below(filesystem: fs.FileSystem, directory: str, address: str) -> list[str]:
    try:
        entries = filesystem.get_file_info(fs.FileSelector(directory, recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise UsageProblem(f"{address}: cannot be listed ({one_line(error)}).", "data/unreadable") from error
    below = (entry.path for entry in entries if entry.type == fs.FileType.File)
    hidden = (directory.count("/") + 1) if directory else 0
    return sorted(path for path in below if not any(part.startswith(".") for part in path.split("/")[hidden:]))


def _file_rows(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    try:
        if path.endswith(".parquet"):
            yield from _parquet_rows(filesystem, path, name)
        elif path.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(name, _lines(filesystem, path, name))
        elif path.endswith((".json", ".json.gz")):
            yield from _json(name, list(_lines(filesystem, path, name)))
        else:
            yield from _text_blocks(name, _lines(filesystem, path, name))
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{name}: this is not UTF-8 text ({error}).", "data/unreadable") from error
    except (pa.ArrowException, OSError) as error:
        raise UsageProblem(f"{name}: cannot be read ({one_line(error)}).", "data/unreadable") from error


def _lines(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines without their end. Only \\n ends a line: JSON may hold other separators."""
    number = 0
    with filesystem.open_input_stream(path, compression=None) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        try:
            for number, line in enumerate(_split(stream), start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise UsageProblem(
                f"{name}:{number}: this is not UTF-8 text ({error.reason} at byte {error.start + 1} of the line).",
                "data/unreadable",
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UsageProblem(
                f"{name}:{number + 1}: cannot be read from here on ({error}).", "data/unreadable"
            ) from error


def _split(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _json_lines(name: str, lines: Iterator[tuple[int, str]]) -> Iterator[RawRow]:
    for number, line in lines:
        if line.strip():
            yield RawRow(f"{name}:{number}", _json_object(f"{name}:{number}", line))


def _json(name: str, lines: list[tuple[int, str]]) -> Iterator[RawRow]:
    """A .json file holds one list of objects, or is JSON lines under another name."""
    whole = "\n".join(line for _, line in lines)
    if not whole.lstrip().startswith("["):
        yield from _json_lines(name, iter(lines))
        return
    try:
        elements = json.loads(whole)
    except json.JSONDecodeError as error:
        raise UsageProblem(f"{name}:{error.lineno}: this is not JSON ({error.msg}).", "data/unreadable") from error
    except (ValueError, RecursionError) as error:
        raise unreadable_json(f"{name}:{_line_of_failure(whole)}", error) from error
    escaped = _SURROGATE.search(whole) is not None
    for number, element in enumerate(elements, start=1):
        place = f"{name}, element {number}"
        if not isinstance(element, dict):
            raise UsageProblem(f"{place}: a row should be an object with named columns.", "data/row")
        if escaped:
            _check_text(place, element)
        yield RawRow(place, element)


def _line_of_failure(whole: str) -> int:
    """The line, from 1, of the first element of this JSON list that cannot be read."""
    decoder = json.JSONDecoder()
    at = whole.index("[") + 1
    while True:
        at = _BETWEEN_ELEMENTS.match(whole, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            _, at = decoder.raw_decode(whole, at)
        except (ValueError, RecursionError):
            return whole.count("\n", 0, at) + 1


def _check_text(place: str, value: Any) -> None:
    """Raises UsageProblem where a text in `value` has half of a surrogate pair, which no file or model could hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UsageProblem(
            f"{place}: a text holds half a character ({half!a}), so it is no Unicode text.", "data/row"
        ) from error
    except RecursionError as error:
        raise unreadable_json(place, error) from error


def _json_object(place: str, line: str) -> dict[str, Any]:
    value = parse_json(line, place)
    if not isinstance(value, dict):
        raise UsageProblem(f"{place}: a row should be an object with named columns.", "data/row")
    if _SURROGATE.search(line):  # UTF-8 has none: only an escape can write one
        _check_text(place, value)
    return value


def _parquet_rows(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    with filesystem.open_input_file(path) as stream:
        number = 0
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield RawRow(f"{name}, row {number}", columns)


def _text_blocks(name: str, lines: Iterator[tuple[int, str]]) -> Iterator[RawRow]:
    block: list[str] = []
    first = 1
    for number, line in lines:
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield RawRow(f"{name}:{first}", {"text": "\n".join(block)})
            block = []
    if block:
        yield RawRow(f"{name}:{first}", {"text": "\n".join(block)})


def _hub_rows(address: str) -> Iterator[RawRow]:
    name, split = name_and_split(address)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageProblem(
            f"{address}: reading from the Hub needs the `datasets` package (pip install 'amenable[hub]').",
            "data/hub-package",
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split, revision=hub_card(name).commit)
    except Exception as error:
        raise UsageProblem(
            f"{address}: this dataset cannot be loaded ({type(error).__name__}: {one_line(error)}).", "data/hub"
        ) from error
    for number, columns in enumerate(rows, start=1):
        yield RawRow(f"{address}, row {number}", dict(columns))
