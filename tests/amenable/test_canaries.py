"""Planted secrets do not leave the environment: not with a job, not in a sentence. And a secret that did would be
found: the search has its own control."""

import base64
import gzip
import json
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import cluster.job_server as job_server
from amenable.cli import app
from tests.amenable.stand_in_jobs import StandInJobs
from tests.canaries import CANARIES, forms, found_in, search

TOKEN = CANARIES["REWARD_TOKEN"]


def parquet(text: str) -> bytes:
    table = pa.table({"meta": pa.array(["none", text, "none"]).dictionary_encode()})
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.log", f"sent Bearer {TOKEN} to".encode()),
        ("url.txt", f"http://h/?k={quote(TOKEN, safe='')}&x".encode()),
        ("json.json", json.dumps({"authorization": f"Bearer {TOKEN}"}).encode()),
        ("basic.txt", b"Basic " + base64.b64encode(f"ann:{TOKEN}:rest".encode())),
        ("basic-2.txt", b"Basic " + base64.b64encode(f"anna:{TOKEN}".encode())),
        ("basic-3.txt", base64.urlsafe_b64encode(f"annas:{TOKEN}..".encode())),
        ("hex.bin", f"header {TOKEN.encode().hex()}".encode()),
        ("wide.bin", f"x{TOKEN}".encode("utf-16-le")),
        ("rows.jsonl.gz", gzip.compress(json.dumps({"prompt": TOKEN}).encode())),
        ("rows.parquet", parquet(f"a prompt with {TOKEN}")),
    ],
)
def test_a_secret_in_a_file_is_found_however_it_is_written(tmp_path, name, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.txt").write_text("nothing of interest")
    assert search(tmp_path) == []
    (tmp_path / "deep" / name).write_bytes(content)
    found = search(tmp_path)
    assert found
    assert all(one.startswith(f"deep/{name}: REWARD_TOKEN ") for one in found)


def test_a_secret_in_a_files_name_is_found(tmp_path):
    (tmp_path / f"model-{CANARIES['HF_TOKEN']}").write_bytes(b"")
    assert len(search(tmp_path)) == 1


def test_every_form_of_every_canary_is_long_enough_to_be_found_by_nothing_else():
    assert all(len(written) >= 16 for secret in CANARIES.values() for written in forms(secret).values())


@pytest.fixture
def cluster(monkeypatch, tmp_path) -> StandInJobs:
    """A cluster that answers, and a project with a recipe, in which the command is, with secrets all around it."""
    stand_in = StandInJobs()
    monkeypatch.setattr(job_server, "_client", lambda url: stand_in)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "AMENABLE_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("AMENABLE_OWNER", "ann")
    (tmp_path / "x.yaml").write_text(
        "name: x\nreward: {kind: http, url: 'https://host/score', token_variable: REWARD_TOKEN}\n"
    )
    (tmp_path / ".env").write_text("".join(f"{name}={secret}\n" for name, secret in CANARIES.items()))
    monkeypatch.chdir(tmp_path)
    return stand_in


def submit(*arguments: str):
    return CliRunner().invoke(app, ["submit", "x.yaml", "--storage", "s3://bucket/runs", *arguments])


@pytest.mark.parametrize("how", [("--dry-run", "--json"), ("--dry-run",), ("--no-wait", "--json")])
def test_a_job_has_no_secret_of_the_machine_that_submits_it(cluster, how):
    ended = submit("--env", "HF_TOKEN", "--env", "REWARD_TOKEN", *how)
    assert ended.exit_code == 0, ended.output
    assert ended.output.strip()
    asked = json.dumps([cluster.requests, ended.stdout, ended.stderr])
    assert ("--dry-run" in how) != bool(cluster.requests)
    assert found_in(asked.encode()) == []


def test_what_travels_with_a_job_has_no_file_of_variables(cluster):
    ended = submit("--dry-run", "--json")
    assert json.loads(ended.stdout)["package"]["files"] == 1  # the recipe


@pytest.mark.parametrize("name", CANARIES)
def test_a_secret_that_is_given_is_refused_and_not_repeated(cluster, name):
    secret = CANARIES[name]
    for given in (f"name={secret}", f"model.base=/models/{secret}/7b"):
        ended = submit("--no-wait", "--json", given)
        assert ended.exit_code == 2, ended.output
        assert found_in((ended.stdout + ended.stderr).encode()) == []
    assert cluster.requests == []
    ended = submit("--no-wait", "--env", f"{name}={secret}")
    assert ended.exit_code == 2
    assert found_in((ended.stdout + ended.stderr).encode()) == []
