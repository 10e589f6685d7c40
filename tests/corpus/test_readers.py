"""Raw rows from every kind of file, with their places."""

import gzip
import json
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.problems import UsageProblem
from corpus.readers import read_rows
from corpus.storage import _bounded

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
    def load_dataset(name, split):
        if name != "someone/something":
            raise ConnectionError("no such dataset")
        return [{"prompt": f"{name} {split}"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert columns("hub:someone/something") == [{"prompt": "someone/something train"}]
    assert columns("hub:someone/something:test") == [{"prompt": "someone/something test"}]
    with pytest.raises(UsageProblem, match=r"hub:other: this dataset cannot be loaded .*no such dataset"):
        columns("hub:other")


@pytest.fixture
def bucket(monkeypatch):
    """A tiny S3 server on this machine: GET, HEAD and a list of the keys. Yields the keys and the URI's query."""
    keys: dict[str, bytes] = {}

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            key = url.path.removeprefix("/bucket").strip("/")
            status, content = 200, b""
            if "list-type" in query:
                prefix = query.get("prefix", [""])[0]
                found = [name for name in keys if name.startswith(prefix)]
                entries = "".join(
                    f"<Contents><Key>{name}</Key><Size>{len(keys[name])}</Size>"
                    "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                    for name in found
                )
                content = (
                    f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
                    f"{entries}</ListBucketResult>"
                ).encode()
            elif key in keys:
                content = keys[key]
                if wanted := self.headers.get("Range"):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    status, content = 206, content[int(first) : int(last) + 1]
            elif key:
                status = 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield keys, f"?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_files_and_directories_are_read_from_an_object_store(bucket):
    keys, query = bucket
    keys["data/a.jsonl"] = LINES.encode()
    keys["data/b.jsonl.gz"] = gzip.compress(LINES.encode())
    keys["data/README.md"] = b"not data"
    assert columns(f"s3://bucket/data/a.jsonl{query}") == ROWS
    assert columns(f"s3://bucket/data{query}") == ROWS * 2
    with pytest.raises(UsageProblem, match=r"absent\.jsonl.*no such file"):
        columns(f"s3://bucket/data/absent.jsonl{query}")


def test_an_object_store_that_nobody_answers_for_is_told_soon(monkeypatch):
    monkeypatch.setattr("corpus.storage.GCS_RETRY_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(UsageProblem, match=r"cannot be reached \(google::cloud::Status\(UNAVAILABLE") as told:
        columns("gs://anonymous@bucket/a.jsonl?scheme=http&endpoint_override=127.0.0.1:1")
    assert time.monotonic() - began < 10
    assert "\n" not in str(told.value)


def test_addresses_of_google_get_a_limit_to_their_retries_and_keep_one_of_their_own():
    given = "gs://b/x?retry_limit_seconds=7"
    assert _bounded(given) == given
    assert _bounded("gs://b/x") == "gs://b/x?retry_limit_seconds=30"
    assert _bounded("gs://b/x?scheme=http") == "gs://b/x?scheme=http&retry_limit_seconds=30"
    assert _bounded("s3://b/x") == "s3://b/x"
