"""Raw rows from every kind of file, with their places."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.hub import HubCard
from corpus.problems import UsageProblem
from corpus.readers import read_rows

ROWS = [{"prompt": "a"}, {"prompt": "é\u2028b"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def columns(address):
    return [row.columns for row in read_rows(address)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.json", LINES.rstrip("\n").encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_every_kind_of_json_file_gives_the_same_rows(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert columns(tmp_path / name) == ROWS


def test_parquet_rows_and_their_places(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert columns(tmp_path / "a.parquet") == ROWS
    assert [row.place for row in read_rows(tmp_path / "a.parquet")][1].endswith("a.parquet, row 2")


def test_text_files_are_blocks_between_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    rows = list(read_rows(tmp_path / "a.txt"))
    assert [row.columns["text"] for row in rows] == ["one\ntwo", "three"]
    assert [row.place.rpartition(":")[2] for row in rows] == ["1", "5"]


def test_directories_and_globs_stand_for_their_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in columns(tmp_path)] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [row["text"] for row in columns(f"{tmp_path}/[ab].jsonl")] == ["a.jsonl", "b.jsonl"]


def test_a_relative_path_is_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(LINES)
    monkeypatch.chdir(tmp_path)
    assert columns("a.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: this is not JSON"),
        ("a.jsonl", b'{"a": "b', r"this is not JSON \(Unterminated string starting at column 7\)"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"a\.jsonl:3: a row should be an object"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json:2: this is not JSON"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, element 2"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: this is not UTF-8 text \(invalid start byte at byte 8"),
        ("a.txt", b"one\n\ntwo \xc3", r"a\.txt:3: this is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x\\ud83d"}\n', r"a\.jsonl:2: a text holds half a character \('.ud83d'\)"),
        ("a.json", b'[{"a": 1},\n{"a": ["x\\uDE00"]}]', r"a\.json, element 2: a text holds half a character"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", r"a\.jsonl:2: .*too many digits"),
        ("a.json", b'[{"a": 1},\n{"a": ' + b"1" * 5000 + b"}]", r"a\.json:2: .*too many digits"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 99999, r"a\.jsonl:2: .*nested too deeply"),
        ("a.json", b'[{"a": 1},\n\n{"a": ' + b"[" * 99999, r"a\.json:3: .*nested too deeply"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz:1: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:20] + b"\xff" * 40, r"a\.jsonl\.gz:1: cannot be read"),
        ("a.parquet", b"plain text", "cannot be read"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageProblem, match=message):
        columns(tmp_path / name)


def test_a_whole_character_written_as_two_escapes_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud83d"}\n')
    assert columns(tmp_path / "a.jsonl") == [{"a": "😀"}, {"a": "\\ud83d"}]


@pytest.mark.parametrize("address", ["a\0b.jsonl", "s3://bucket/a\0b.jsonl", "*\0.jsonl"])
def test_a_nul_in_an_address_is_said(address):
    with pytest.raises(UsageProblem, match="NUL"):
        columns(address)


def test_a_file_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    from pyarrow import fs

    class Closed(fs.LocalFileSystem):
        def open_input_stream(self, *args, **options):
            raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_text(LINES)
    monkeypatch.setattr("corpus.readers.resolve", lambda address: (Closed(), address))  # the tests may run as root
    with pytest.raises(UsageProblem, match=r"a\.jsonl: cannot be read \(.*Permission denied"):
        columns(str(tmp_path / "a.jsonl"))


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    for address, message in (
        (tmp_path / "absent.jsonl", "no such file"),
        (tmp_path, "no data file"),
        (tmp_path / "notes.md", "should end in one of"),
        (f"{tmp_path}/*.jsonl", "no file matches"),
        (f"{tmp_path}/*", "not a data file"),
    ):
        with pytest.raises(UsageProblem, match=message):
            columns(address)


def test_a_hub_dataset_without_the_package_is_a_usage_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageProblem, match="needs the `datasets` package"):
        columns("hub:someone/something")


def test_a_hub_dataset_is_read_by_name_and_split(monkeypatch):
    def load_dataset(name, split, revision):
        if name != "someone/something":
            raise ConnectionError("no such dataset\nsee the Hub")
        return [{"prompt": f"{name} {split} {revision}"}]

    monkeypatch.setattr("corpus.readers.hub_card", lambda name: HubCard(commit="c0ffee"))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert columns("hub:someone/something") == [{"prompt": "someone/something train c0ffee"}]
    assert columns("hub:someone/something:test") == [{"prompt": "someone/something test c0ffee"}]
    with pytest.raises(UsageProblem, match=r"hub:other: this dataset cannot be loaded .*no such dataset see the Hub"):
        columns("hub:other")
