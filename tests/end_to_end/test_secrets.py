"""Secrets that stand around a run get into nothing that it leaves: not into its directory, not into Ray's logs, not
into what it says, also where it fails over one of them."""

import json
import os
from pathlib import Path

import pytest

from tests.canaries import CANARIES, found_in, search
from tests.end_to_end.commands import RECIPE, finish, start

pytest_plugins = ["tests.object_store"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_run_leaves_no_secret_of_its_environment_anywhere(folder: Path, run: Path, ray_directory: Path):
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds >= {".yaml", ".json", ".jsonl", ".html", ".parquet", ".safetensors"}
    assert list(run.rglob("events.out.tfevents.*"))
    assert (folder / "stderr").read_text().strip()
    assert search(folder) == []
    logs = [path for path in ray_directory.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")]
    assert [path.name for path in logs if path.name.startswith("worker-")]
    assert search(ray_directory) == []


def test_a_secret_in_such_a_run_would_be_found(run: Path, tmp_path: Path):
    kept = tmp_path / "run"
    kept.mkdir()
    for name in ("lineage.json", "report.html"):
        (kept / name).write_bytes((run / name).read_bytes() + CANARIES["WANDB_API_KEY"].encode())
    assert [line.partition(":")[0] for line in search(kept)] == ["lineage.json", "report.html"]


def test_the_lineage_of_the_built_in_world_says_whose_licence_it_has(run: Path):
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["data_sets"] == {"built-in world": {"licence": "Apache-2.0", "licence_from": "amenable"}}
    assert "built-in world" in (run / "report.html").read_text()


def failing(folder: Path, *arguments: str, **environment: str) -> str:
    """What a command says that ends with exit code 2, with the planted secrets around it."""
    out, err = finish(start(folder, "run", RECIPE, *arguments, "--json", **(CANARIES | environment)), code=2)
    assert "Traceback" not in err
    assert found_in((out + err).encode()) == []
    assert search(folder) == []
    return json.loads(out)["problem"]


def test_a_reward_service_that_is_not_there_is_told_of_without_its_token(tmp_path: Path):
    reward = ["reward.kind=http", "reward.url=http://127.0.0.1:9/score", "reward.token_variable=REWARD_TOKEN"]
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}  # with one the run itself finds out
    assert "nobody answers at 127.0.0.1:9" in failing(tmp_path, *reward, **proxies)


@pytest.mark.usefixtures("store")
def test_a_store_that_refuses_keys_is_told_of_without_them(tmp_path: Path, query: str, check_keys):
    check_keys()
    copies = {"AMENABLE_WORKING_COPIES": str(tmp_path / "copies"), "NO_PROXY": "127.0.0.1"}
    said = failing(tmp_path, "--run", f"s3://bucket/run{query}", **copies)
    assert "s3://bucket/run" in said
    said = failing(tmp_path, f"corpus.path=s3://bucket/rows.jsonl{query}", **copies)
    assert "ACCESS_DENIED" in said or "INVALID_ACCESS_KEY" in said
