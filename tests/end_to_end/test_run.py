"""The whole program from the command line, at a size that learns nothing and goes through everything."""

import json
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from actors.attempts import read_attempts
from tests.end_to_end.commands import RECIPE, UPDATES, finish, start
from tests.learning_metrics import learning

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "round-01" / "ppo" / "metrics.jsonl").read_text().splitlines()]


def episodes(run: Path):
    return [pq.read_table(path) for path in sorted((run / "round-01" / "ppo" / "episodes").glob("*.parquet"))]


def test_the_run_directory_explains_itself(run: Path):
    wanted = ["recipe.yaml", "lineage.json", "summary.json", "report.html", "round-01/eval/results.json"]
    wanted += ["round-01/ppo/metrics.jsonl", "round-01/ppo/evaluations.jsonl", "round-01/rm/export/config.json"]
    assert [name for name in wanted if not (run / name).exists()] == []
    assert "ynthetic" in (run / "report.html").read_text().split("<body", 1)[1][:1500]
    lineage = json.loads((run / "lineage.json").read_text())
    assert {"ray", "torch", "transformers", "deepspeed"} <= set(lineage["versions"])


def test_exports_load_untouched_in_transformers(run: Path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    ppo = run / "round-01" / "ppo"
    for name in ("policy", "ema", "best"):
        AutoModelForCausalLM.from_pretrained(ppo / name)
    AutoModelForTokenClassification.from_pretrained(ppo / "value")
    AutoModelForSequenceClassification.from_pretrained(run / "round-01" / "rm" / "export")


def test_on_policy_every_slot_is_trained_once_by_the_batchs_own_weights(run: Path):
    tables = episodes(run)
    slots = [slot for table in tables for slot in table["slot"].to_pylist()]
    assert slots == list(range(UPDATES * 32))
    for update, table in enumerate(tables):
        spans = [span for row in table["version_spans"].to_pylist() for span in row]
        assert {span["update"] for span in spans} == {update}


def test_engine_and_learner_agree_within_1e_4_nats_in_float32(run: Path):
    rows = metrics(run)
    assert len(rows) == UPDATES
    assert all(0 <= row["mismatch/max_abs_log_ratio"] <= 1e-4 for row in rows)
    assert abs(rows[0]["objective/kl"]) < 1e-3  # the policy still is its reference
    assert abs(rows[-1]["objective/kl"]) > abs(rows[0]["objective/kl"])  # and then is not


def test_ppo_starts_from_ppo_init_which_is_its_reference_and_not_from_the_sft_baseline(run: Path):
    from transformers import AutoModelForCausalLM

    first = episodes(run)[0].slice(0, 8).to_pylist()
    selected = json.loads((run / "round-01" / "select-sft" / "selection.json").read_text())["selected"]

    def apart(directory: Path, column: str) -> float:
        """The largest difference in nats between a column of the first update's episodes and what the model says."""
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        found = 0.0
        for episode in first:
            prompt, response = episode["prompt_tokens"], episode["response_tokens"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            said = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            found = max(found, (said - torch.tensor(episode[column])).abs().max().item())
        return found

    for column in ("behaviour_logprobs", "reference_logprobs"):
        assert apart(run / "round-01" / "ppo-init" / "export", column) < 1e-4, column
        assert apart(run / "sft" / selected, column) > 1e-2, column


def test_a_second_run_reuses_every_stage_and_a_changed_one_only_redoes_what_reads_it(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    out, _ = finish(start(tmp_path, "run", RECIPE, "--json"))
    assert all(stage["reused"] for stage in json.loads(out)["stages"].values())
    out, _ = finish(start(tmp_path, "run", RECIPE, "evaluation.prompts=12", "--json"))
    redone = {name for name, stage in json.loads(out)["stages"].items() if not stage["reused"]}
    assert redone == {"round-01/eval"}


def without_ppo(folder: Path, target: Path) -> Path:
    """A copy of the run in which PPO and evaluation are still to be done."""
    shutil.copytree(folder / "runs", target / "runs")
    for name in ("ppo", "eval"):
        shutil.rmtree(target / "runs" / "tiny" / "round-01" / name)
    return target


def test_with_staleness_1_tokens_are_at_most_one_update_old_and_some_are(folder: Path, tmp_path: Path):
    finish(start(without_ppo(folder, tmp_path), "ppo", RECIPE, "ppo.max_staleness=1", "--json"))
    ages = set()
    for update, table in enumerate(episodes(tmp_path / "runs" / "tiny")):
        ages |= {update - span["update"] for row in table["version_spans"].to_pylist() for span in row}
    assert ages == {0, 1}


@pytest.mark.extended  # on a store, with a lost disk beside it: test_stored_run.py
def test_a_run_stopped_in_ppo_goes_on_to_bitwise_the_same_weights_and_episodes(folder: Path, run: Path, tmp_path: Path):
    without_ppo(folder, tmp_path)
    process = start(tmp_path, "ppo", RECIPE)
    log = tmp_path / "runs" / "tiny" / "round-01" / "ppo" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, code=130)
    assert "the same command continues" in err
    trained = log.read_text().count("\n")
    assert trained < UPDATES, "the signal came too late to stop anything"
    finish(start(tmp_path, "ppo", RECIPE))
    again = tmp_path / "runs" / "tiny"
    begun, resumed = (attempt.run_epoch for attempt in read_attempts(again / "round-01" / "ppo"))
    assert begun is not None
    assert resumed == begun + 1  # each attempt names the command that held the run's lease
    for name in ("policy", "ema", "value"):
        one = load_file(run / "round-01" / "ppo" / name / "model.safetensors")
        other = load_file(again / "round-01" / "ppo" / name / "model.safetensors")
        assert all(one[key].equal(other[key]) for key in one), name
    columns = ["slot", "prompt_id", "response_tokens", "behaviour_logprobs", "reference_logprobs", "score"]
    first = {row["slot"]: row for table in episodes(run) for row in table.select(columns).to_pylist()}
    second = {row["slot"]: row for table in episodes(again) for row in table.select(columns).to_pylist()}
    assert first == second
    assert [*map(learning, metrics(again))] == [*map(learning, metrics(run))]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("ppo.clp=0.1", "clip"),
        ("ppo.clip=wide", "ppo.clip"),
        ("sampling.top_p=0.9", "top_p"),
        ("ppo.batch_size=30", "multiple of 4"),
        ("collect.min_responses=1", "collect.min_responses"),
        ("model.base=/nowhere/at/all", "/nowhere/at/all"),
        ("corpus.path=/nowhere/data.jsonl", "/nowhere/data.jsonl"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_sentence_that_names_it(tmp_path: Path, change: str, says: str):
    _, err = finish(start(tmp_path, "run", RECIPE, change), code=2)
    last = err.strip().splitlines()[-1]
    assert says in last
    assert "Traceback" not in err
