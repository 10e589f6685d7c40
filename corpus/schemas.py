"""The Arrow tables that pass between stages, their checks, and their Parquet files.

Token columns are `list<int32>`. Every written table carries its name and schema version in the metadata.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported; a type checker cannot see them)

import os
from collections import Counter
from math import comb
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpus.problems import UsageProblem
from corpus.storage import resolve, write_atomically

TableName = Literal["pretraining", "demonstrations", "prompts", "comparisons", "samples"]

SCHEMA_VERSION = 1
"""Raised when a column changes. A reader refuses versions it does not know."""

NAME_KEY = b"amenable.table"
VERSION_KEY = b"schema_version"

TOKENS = pa.list_(pa.int32())

_COLUMNS: dict[TableName, list[tuple[str, pa.DataType]]] = {
    "pretraining": [("tokens", TOKENS)],
    "demonstrations": [
        ("prompt_id", pa.string()),
        ("user_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_tokens", TOKENS),
        ("response_tokens", TOKENS),
        ("meta", pa.string()),
    ],
    "prompts": [
        ("prompt_id", pa.string()),
        ("user_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_tokens", TOKENS),
        ("meta", pa.string()),
    ],
    "comparisons": [
        ("prompt_id", pa.string()),
        ("user_id", pa.string()),
        ("labeler_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_tokens", TOKENS),
        ("responses", pa.list_(pa.string())),
        ("response_tokens", pa.list_(TOKENS)),
        ("ranks", pa.list_(pa.int32())),
        ("meta", pa.string()),
    ],
    "samples": [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt_tokens", TOKENS),
        ("response_tokens", TOKENS),
        ("response", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ],
}


def schema(name: TableName) -> pa.Schema:
    """The schema of table `name`, with its name and schema version in the metadata."""
    if name not in get_args(TableName):
        raise UsageProblem(f"there is no table {name!r}; the tables are {', '.join(_COLUMNS)}.", "data/table")
    metadata = {NAME_KEY: name.encode(), VERSION_KEY: str(SCHEMA_VERSION).encode()}
    fields = [pa.field(column, kind, nullable=True) for column, kind in _COLUMNS[name]]
    return pa.schema(fields, metadata=metadata)


def make_table(name: TableName, columns: dict[str, list]) -> pa.Table:
    """A checked table `name` from Python lists, one per column."""
    wanted = schema(name)
    if set(columns) != set(wanted.names):
        raise UsageProblem(
            f"{name}: the columns are {', '.join(sorted(columns))}; needed: {', '.join(wanted.names)}.", "data/table"
        )
    try:
        arrays = [pa.array(columns[field.name], type=field.type) for field in wanted]
        table = pa.Table.from_arrays(arrays, schema=wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UsageProblem(f"{name}: the rows do not fit the table ({error}).", "data/table") from error
    validate(table, name)
    return table


def validate(table: pa.Table, name: TableName, source: str = "") -> None:
    """Raises UsageProblem, naming column and first bad row (counted from 0), unless `table` is a good table `name`.

    Checked: the columns and their types, no nulls, token lists not empty, and in comparisons that each row has
    K >= 2 responses and as many token lists and ranks, ranks counted from 0; in samples one log-prob per token.
    """
    where = f"{source}: " if source else ""
    wanted = schema(name)
    missing = [column for column in wanted.names if column not in table.column_names]
    if missing:
        raise UsageProblem(f"{where}the {name} table lacks the column(s) {', '.join(missing)}.", "data/table")
    extra = [column for column in table.column_names if column not in wanted.names]
    if extra:
        raise UsageProblem(f"{where}the {name} table has unknown column(s) {', '.join(extra)}.", "data/table")
    for field in wanted:
        if not table.schema.field(field.name).type.equals(field.type):
            found = table.schema.field(field.name).type
            raise UsageProblem(
                f"{where}column {field.name} of the {name} table is {found}; it should be {field.type}.", "data/table"
            )
        _refuse(table[field.name].is_null(), f"{where}column {field.name} of the {name} table is empty")
        _refuse_nested_nulls(table[field.name], f"{where}column {field.name} of the {name} table")
    for column in ("tokens", "prompt_tokens", "response_tokens"):
        if column in wanted.names and wanted.field(column).type == TOKENS:
            lengths = pc.list_value_length(table[column])
            _refuse(pc.equal(lengths, 0), f"{where}{column} of the {name} table has no tokens")
    if name == "comparisons":
        _validate_comparisons(table, where)
    if name == "samples":
        same = pc.equal(pc.list_value_length(table["response_tokens"]), pc.list_value_length(table["logprobs"]))
        _refuse(pc.invert(same), f"{where}the samples table needs one log-prob per response token, which fails")
        known = pc.is_in(table["finish_reason"], value_set=pa.array(["stop", "length"]))
        _refuse(pc.invert(known), f'{where}finish_reason of the samples table is neither "stop" nor "length"')


def _validate_comparisons(table: pa.Table, where: str) -> None:
    count = pc.list_value_length(table["responses"])
    _refuse(pc.less(count, 2), f"{where}the comparisons table has fewer than 2 responses")
    for column in ("response_tokens", "ranks"):
        same = pc.equal(count, pc.list_value_length(table[column]))
        _refuse(pc.invert(same), f"{where}the comparisons table has another number of {column} than of responses")
    token_lists = table["response_tokens"].combine_chunks().flatten()
    if pc.any(pc.equal(pc.list_value_length(token_lists), 0)).as_py():
        raise UsageProblem(
            f"{where}response_tokens of the comparisons table has a response without tokens.", "data/table"
        )
    best = pa.chunked_array([pa.array([min(ranks) for ranks in table["ranks"].to_pylist()], pa.int32())])
    _refuse(pc.not_equal(best, 0), f"{where}the comparisons table has ranks that do not begin at 0 (the best)")


def untied_pairs(table: pa.Table) -> int:
    """How many pairs of responses of a comparisons table have different ranks: what a reward model can learn from."""
    rows = table["ranks"].to_pylist()
    return sum(comb(len(ranks), 2) - sum(comb(same, 2) for same in Counter(ranks).values()) for ranks in rows)


def _refuse(bad: pa.ChunkedArray, sentence: str) -> None:
    if len(bad) and pc.any(bad).as_py():
        raise UsageProblem(f"{sentence} (row {pc.index(bad, True).as_py()}).", "data/table")


def _refuse_nested_nulls(column: pa.ChunkedArray, what: str) -> None:
    while pa.types.is_list(column.type):
        column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], type=column.type.value_type)
        if column.null_count:
            raise UsageProblem(f"{what} holds an empty value inside a list.", "data/table")


def write_table(table: pa.Table, path: str | os.PathLike[str], name: TableName) -> None:
    """Writes the checked table as Parquet to a local path or object store; whole or not at all.

    Metadata that `table` already carries (counts of filtered rows) is kept beside the name and schema version.
    """
    validate(table, name, str(path))
    table = table.select(schema(name).names)
    metadata = {**(table.schema.metadata or {}), **(schema(name).metadata or {})}
    table = table.replace_schema_metadata(metadata)
    write_atomically(path, lambda stream: pq.write_table(table, stream, compression="zstd"))


def read_table(path: str | os.PathLike[str], name: TableName) -> pa.Table:
    """The table `name` in the Parquet file `path`, checked.

    Raises UsageProblem where there is no such file, it is no Parquet file, another table, or of a later schema version.
    """
    filesystem, inner = resolve(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            table = pq.read_table(stream)
    except FileNotFoundError as error:
        raise UsageProblem(f"{path}: there is no such file; a {name} table was expected.", "data/not-found") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageProblem(f"{path}: this is not a readable Parquet file ({error}).", "data/unreadable") from error
    metadata = table.schema.metadata or {}
    written_as = metadata.get(NAME_KEY, name.encode()).decode()
    if written_as != name:
        raise UsageProblem(f"{path}: this is a {written_as} table; a {name} table was expected.", "data/table")
    version = metadata.get(VERSION_KEY, b"missing").decode()
    if version != str(SCHEMA_VERSION):
        raise UsageProblem(
            f"{path}: its schema version is {version}; this program reads version {SCHEMA_VERSION}.",
            "run/schema-version",
        )
    validate(table, name, str(path))
    return table
