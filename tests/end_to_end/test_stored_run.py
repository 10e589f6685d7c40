"""A run on S3, as a server on this machine keeps it: stopped in PPO, its disk lost, continued bitwise the same."""

import io
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load, load_file

from tests.end_to_end.commands import RECIPE, UPDATES, finish, start
from tests.learning_metrics import learning

pytest_plugins = ["tests.object_store"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PPO = "round-01/ppo"
COLUMNS = ["slot", "prompt_id", "response_tokens", "behaviour_logprobs", "reference_logprobs", "score"]


def start_on(machine: Path, address: str) -> subprocess.Popen:
    """`amenable ppo` on a machine whose whole disk is `machine`."""
    machine.mkdir(exist_ok=True)
    copies = {"AMENABLE_WORKING_COPIES": str(machine / "copies")}
    return start(machine, "ppo", RECIPE, "--run", address, "--json", **copies)


def read(store, name: str) -> bytes:
    return store.get_object(Bucket="bucket", Key=name)["Body"].read()


def episodes(store, keys_in, run: str) -> dict[int, dict]:
    """What was trained of each slot: of two files of one update the later attempt is in the weights."""
    names = sorted(
        (name for name in keys_in(f"{run}/{PPO}/episodes/") if name.endswith(".parquet")),
        key=lambda name: [int(part) for part in name.removesuffix(".parquet").split("-")[-3::2]],
    )
    tables = [pq.read_table(io.BytesIO(read(store, name))) for name in names]
    return {row["slot"]: row for table in tables for row in table.select(COLUMNS).to_pylist()}


def trained_locally(run: Path) -> dict[int, dict]:
    tables = [pq.read_table(path) for path in sorted((run / PPO / "episodes").glob("*.parquet"))]
    return {row["slot"]: row for table in tables for row in table.select(COLUMNS).to_pylist()}


def test_a_run_whose_disk_is_lost_goes_on_from_the_store_to_bitwise_the_same_weights(
    run, store, query, keys_in, tmp_path
):
    """The same as a run that stayed on one disk, `run`: what that had before PPO is in the store to begin with."""
    address = f"s3://bucket/run{query}"
    for path in sorted(each for each in run.rglob("*") if each.is_file()):
        name = path.relative_to(run).as_posix()
        if not name.startswith((f"{PPO}/", "round-01/eval/", "published/", "summary", "report", ".", "run.lease")):
            store.upload_file(str(path), "bucket", f"run/{name}")

    process = start_on(tmp_path / "machine-1", address)
    deadline = time.monotonic() + 400
    while not [name for name in keys_in(f"run/{PPO}/checkpoints/") if name.endswith("manifest.json")]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint came to the store"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    finish(process, code=130)
    trained = read(store, f"run/{PPO}/metrics.jsonl").count(b"\n")
    assert 2 <= trained < UPDATES, "the signal came too late to stop anything"
    shutil.rmtree(tmp_path / "machine-1")

    out, err = finish(start_on(tmp_path / "machine-2", address))
    assert json.loads(out)["run_directory"] == address
    stages = json.loads(out)["stages"]
    assert {name for name, stage in stages.items() if not stage["reused"]} == {PPO}
    assert "continues where it was interrupted" in err
    rows, local = (
        [json.loads(line) for line in lines.splitlines()]
        for lines in (read(store, f"run/{PPO}/metrics.jsonl"), (run / PPO / "metrics.jsonl").read_bytes())
    )
    assert [row["step"] for row in rows] == [*range(1, UPDATES + 1)]
    assert [*map(learning, rows)] == [*map(learning, local)]
    kept = {name.removeprefix("run/") for name in keys_in("run/")}
    wanted = {"recipe.yaml", "lineage.json", "summary.json", "report.html", f"{PPO}/metrics.jsonl"}
    wanted |= {f"{PPO}/evaluations.jsonl", f"{PPO}/ema/model.safetensors", f"{PPO}/stage.json", "sft/stage.json"}
    assert wanted - kept == set()
    assert not [name for name in kept if "/checkpoints/" in name]
    for name in ("policy", "ema", "value"):
        one = load_file(run / PPO / name / "model.safetensors")
        other = load(read(store, f"run/{PPO}/{name}/model.safetensors"))
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    stored = episodes(store, keys_in, "run")
    assert sorted(stored) == list(range(UPDATES * 32))
    assert stored == trained_locally(run)
