"""Data in object stores: S3 as a server on this machine answers it, and what is said where a store does not give it."""

import gzip
import hashlib
import json
import time

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amenable.recipe import Recipe
from amenable.stages.data import source_hashes
from corpus.problems import RunProblem, UsageProblem
from corpus.readers import find_files, read_rows
from corpus.storage import _bounded, write_atomically

pytest_plugins = ["tests.object_store"]

ROWS = [{"prompt": "a"}, {"prompt": "é\u2028b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ALLOW_S3 = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


def columns(address):
    return [row.columns for row in read_rows(address)]


def client(service, server):
    return boto3.client(service, endpoint_url=f"http://{server}", region_name="us-east-1")


def test_every_kind_of_object_is_read(store, query):
    parquet = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    for key, content in (
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.parquet", parquet.getvalue().to_pybytes()),
        ("at@1/a b.jsonl", LINES),
    ):
        store.put_object(Bucket="bucket", Key=key, Body=content)
        assert columns(f"s3://bucket/{key.replace(' ', '%20')}{query}") == ROWS
    assert [row.place for row in read_rows(f"s3://bucket/a.jsonl{query}")][1] == "s3://bucket/a.jsonl:2"
    assert [row.place for row in read_rows(f"s3://bucket/a.parquet{query}")][1] == "s3://bucket/a.parquet, row 2"


def test_a_prefix_or_glob_stands_for_its_data_files_in_order(store, query):
    for key in ("data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl", "data/.hidden/d.jsonl", "data.jsonl"):
        store.put_object(Bucket="bucket", Key=key, Body=json.dumps({"text": key}).encode())
    store.put_object(Bucket="bucket", Key="data/README.md", Body=b"not data")
    store.put_object(Bucket="bucket", Key="data/", Body=b"")  # consoles mark a directory so
    below = ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]
    for address in ("s3://bucket/data", "s3://bucket/data/"):
        assert [row["text"] for row in columns(f"{address}{query}")] == below
    assert [row["text"] for row in columns(f"s3://bucket/d*.jsonl{query}")] == ["data.jsonl", *below]
    assert [row["text"] for row in columns(f"s3://bucket/data/%5Bab%5D.jsonl{query}")] == below[:2]


def test_the_server_may_be_named_by_the_environment(store, s3_server, monkeypatch):
    store.put_object(Bucket="bucket", Key="a.jsonl", Body=LINES)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    assert columns("s3://bucket/a.jsonl") == ROWS


def test_a_malformed_row_is_named_with_its_address_and_line(store, query):
    for key, content, message in (
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"^s3://bucket/data/a\.jsonl:2: this is not JSON"),
        ("b.json", b'[{"a": 1},\n{"a" 2}]', r"^s3://bucket/data/b\.json:2: this is not JSON"),
        ("c.txt", b"one\n\ntwo \xc3", r"^s3://bucket/data/c\.txt:3: this is not UTF-8"),
        ("d.jsonl.gz", gzip.compress(LINES)[:-9], r"^s3://bucket/data/d\.jsonl\.gz:\d: cannot be read"),
        ("e.parquet", b"plain text", r"^s3://bucket/data/e\.parquet: cannot be read"),
    ):
        store.put_object(Bucket="bucket", Key=f"data/{key}", Body=content)
        with pytest.raises(UsageProblem, match=message):
            columns(f"s3://bucket/data/{key[0]}*{query}")


def test_what_is_not_there_is_one_sentence_and_soon(store, query):
    store.put_object(Bucket="bucket", Key="notes.md", Body=b"x")
    began = time.monotonic()
    for place, message in (
        ("bucket/absent.jsonl", "there is no such file or directory"),
        ("nowhere/a.jsonl", "there is no such file or directory"),
        ("nowhere", "there is no such file or directory"),
        ("nowhere/*.jsonl", "no file matches"),
        ("bucket", "there is no data file"),
        ("bucket/notes.md", "not a data file"),
        ("bucket/*.md", "not a data file"),
        ("bucket//a.jsonl", "cannot be reached .Empty path component"),
        ("bucket//below/*.jsonl", "cannot be listed .Empty path component"),
        ("bucket/a b.jsonl", "this storage address cannot be opened .Cannot parse URI"),
    ):
        with pytest.raises(UsageProblem, match=rf"^s3://{place.replace('*', '.*')}.*: {message}") as told:
            columns(f"s3://{place}{query}")
        assert "\n" not in str(told.value)
    assert time.monotonic() - began < 10


def test_a_wrong_key_is_one_sentence_and_is_not_told(store, s3_server, query, monkeypatch, check_keys):
    store.put_object(Bucket="bucket", Key="a.jsonl", Body=LINES)
    users = client("iam", s3_server)
    users.create_user(UserName="anna")
    users.put_user_policy(UserName="anna", PolicyName="s3", PolicyDocument=json.dumps(ALLOW_S3))
    key = users.create_access_key(UserName="anna")["AccessKey"]
    with monkeypatch.context() as strict:
        check_keys()
        strict.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        strict.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        assert columns(f"s3://bucket/a.jsonl{query}") == ROWS
        strict.setenv("AWS_SECRET_ACCESS_KEY", "hush/hush")
        began = time.monotonic()
        for place, message in (
            ("bucket/a.jsonl", "cannot be reached .*ACCESS_DENIED"),
            ("bucket", "cannot be reached .*ACCESS_DENIED"),
            ("bucket/*.jsonl", "cannot be listed .*SIGNATURE_DOES_NOT_MATCH"),
        ):
            with pytest.raises(UsageProblem, match=rf"^s3://bucket.*: {message}") as told:
                columns(f"s3://{place}{query}")
            assert "hush" not in str(told.value)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("address", "told_as"),
    [
        ("s3://zzzz:zzzz@bucket/a.jsonl", "s3://…@bucket/a.jsonl: the name of a bucket should come first"),
        ("s3://zzzz:zz/zz@bucket/a.jsonl?region=r", "s3://…@bucket/a.jsonl: the name of a bucket"),
        ("s3://zzzz@bucket/a.jsonl", "s3://…@bucket/a.jsonl: the name of a bucket"),
        ("s3://zzzz:zz/zz", "s3://…: the name of a bucket"),
        ("s3://localhost:9000/bucket/a.jsonl", "s3://…: the name of a bucket"),
        ("s3://bucket/a.jsonl?endpoint_override=http://me:zzzz@localhost", "s3://bucket/a.jsonl: the name of a bucket"),
        ("s3://bucket/a.jsonl?endpoint_override=me:zzzz%40localhost", "s3://bucket/a.jsonl: the name of a bucket"),
        ("s3://bucket/a.jsonl?allow_bucket_creation=zzzz", "s3://bucket/a.jsonl: this storage address cannot be"),
        ("gs://me:zzzz@bucket/a.jsonl", "gs://…@bucket/a.jsonl: the name of a bucket"),
        ("https://me:zzzz@host/a.jsonl?signature=zzzz", "https://…@host/a.jsonl: this kind of address is not known"),
        ("https://host/a.jsonl?signature=zzzz", "https://host/a.jsonl: this kind of address is not known"),
        ("s3://bucket/a.jsonl?secret_key=zzzz", "s3://bucket/a.jsonl: this storage address cannot be opened"),
        ("s3://bucket/a b.jsonl?secret_key=zzzz", "s3://bucket/a b.jsonl: this storage address cannot be opened"),
        ("gs://bucket/a b.jsonl?token=zzzz", "gs://bucket/a b.jsonl: this storage address cannot be opened"),
    ],
)
def test_an_address_with_a_key_is_refused_and_the_key_is_not_told(address, told_as, keys):
    with pytest.raises(UsageProblem) as told:
        find_files(address)
    assert str(told.value).startswith(told_as)
    assert "zz" not in str(told.value)


def test_an_object_is_written_whole_or_not_at_all(store, query):
    write_atomically(f"s3://bucket/new/a.txt{query}", lambda stream: stream.write(b"whole"))
    assert store.get_object(Bucket="bucket", Key="new/a.txt")["Body"].read() == b"whole"

    def half(stream):
        stream.write(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomically(f"s3://bucket/half.txt{query}", half)
    assert [entry["Key"] for entry in store.list_objects_v2(Bucket="bucket")["Contents"]] == ["new/a.txt"]
    with pytest.raises(RunProblem, match=r"could not be written \(.*NO_SUCH_BUCKET"):
        write_atomically(f"s3://nowhere/a.txt{query}", lambda stream: stream.write(b"x"))


@pytest.mark.slow  # S3's client tries again for 6 s
def test_an_s3_server_that_nobody_answers_for_is_told_soon(keys):
    began = time.monotonic()
    with pytest.raises(UsageProblem, match=r"^s3://bucket/a\.jsonl.*cannot be reached .*Could not connect") as told:
        columns("s3://bucket/a.jsonl?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:1")
    assert time.monotonic() - began < 30
    assert "\n" not in str(told.value)


def test_a_google_store_that_nobody_answers_for_is_told_soon(monkeypatch):
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


def test_the_hashes_of_a_run_name_every_object_by_its_address(store, query, tmp_path):
    for key in ("a", "b"):
        store.put_object(Bucket="bucket", Key=f"data/{key}.jsonl", Body=key.encode())
    recipe = Recipe.model_validate(
        {"name": "hashes", "run_directory": tmp_path / "run", "corpus": {"path": f"s3://bucket/data{query}"}}
    )
    assert source_hashes(recipe) == {
        f"s3://bucket/data/{key}.jsonl": hashlib.sha256(key.encode()).hexdigest() for key in ("a", "b")
    }
