"""A run on S3, as a server on this machine keeps it: stopped in PPO, its disk lost, continued bitwise the same."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load

pytest_plugins = ["tests.object_store"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
RECIPE = str(Path(__file__).parent / "tiny.yaml")
UPDATES = 6
PPO = "round-01/ppo"


def start(machine: Path, address: str) -> subprocess.Popen:
    """`amenable ppo` on a machine whose whole disk is `machine`."""
    machine.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "amenable", "ppo", RECIPE, f"ppo.updates={UPDATES}", "--run", address, "--json"],
        cwd=machine,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "AMENABLE_WORKING_COPIES": str(machine / "copies"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, out[-1000:], err[-3000:])
    return out, err


def read(store, name: str) -> bytes:
    return store.get_object(Bucket="bucket", Key=name)["Body"].read()


def episodes(store, keys_in, run: str) -> dict[int, dict]:
    """What was trained of each slot: of two files of one update the later attempt is in the weights."""
    columns = ["slot", "prompt_id", "response_tokens", "behaviour_logprobs", "reference_logprobs", "score"]
    names = sorted(
        (name for name in keys_in(f"{run}/{PPO}/episodes/") if name.endswith(".parquet")),
        key=lambda name: [int(part) for part in name.removesuffix(".parquet").split("-")[-3::2]],
    )
    tables = [pq.read_table(io.BytesIO(read(store, name))) for name in names]
    return {row["slot"]: row for table in tables for row in table.select(columns).to_pylist()}


def test_a_run_whose_disk_is_lost_goes_on_from_the_store_to_bitwise_the_same_weights(store, query, keys_in, tmp_path):
    whole, stopped = f"s3://bucket/whole{query}", f"s3://bucket/stopped{query}"
    out, _ = finish(start(tmp_path / "machine-1", whole))
    assert json.loads(out)["run_directory"] == whole
    kept = {name.removeprefix("whole/") for name in keys_in("whole/")}
    wanted = {"recipe.yaml", "lineage.json", "summary.json", "report.html", f"{PPO}/metrics.jsonl"}
    wanted |= {f"{PPO}/evaluations.jsonl", f"{PPO}/ema/model.safetensors", f"{PPO}/stage.json", "sft/stage.json"}
    assert wanted - kept == set()
    assert not [name for name in kept if "/checkpoints/" in name]

    before_ppo = [name for name in kept if not name.startswith((PPO, "leases/", "summary", "report"))]
    for name in before_ppo:
        store.copy_object(Bucket="bucket", Key=f"stopped/{name}", CopySource=f"bucket/whole/{name}")

    process = start(tmp_path / "machine-2", stopped)
    deadline = time.monotonic() + 400
    while not [name for name in keys_in(f"stopped/{PPO}/checkpoints/") if name.endswith("manifest.json")]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint came to the store"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    finish(process, code=130)
    trained = read(store, f"stopped/{PPO}/metrics.jsonl").count(b"\n")
    assert 2 <= trained < UPDATES, "the signal came too late to stop anything"
    shutil.rmtree(tmp_path / "machine-2")

    out, err = finish(start(tmp_path / "machine-3", stopped))
    stages = json.loads(out)["stages"]
    assert {name for name, stage in stages.items() if not stage["reused"]} == {PPO}
    assert "continues where it was interrupted" in err
    assert [json.loads(line)["step"] for line in read(store, f"stopped/{PPO}/metrics.jsonl").splitlines()] == [
        *range(1, UPDATES + 1)
    ]
    for name in ("policy", "ema", "value"):
        one, other = (load(read(store, f"{run}/{PPO}/{name}/model.safetensors")) for run in ("whole", "stopped"))
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    first, second = episodes(store, keys_in, "whole"), episodes(store, keys_in, "stopped")
    assert sorted(first) == list(range(UPDATES * 32))
    assert first == second
