"""A made-up run directory, in the layout of docs/architecture.md. Every number and text in it is invented."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.results import evaluate
from evaluation.schema import Accuracy, Results, RewardModelResult, write_results

RECIPE = """\
name: made-up
seed: 7
corpus: null
ppo:
  updates: 48
  batch_size: 128
  kl_coefficient: 0.05
  learning_rate: 0.0001
"""

PROMPTS = (
    "question : name 3 animals without lions . answer :",
    "question : write 2 sentences about anna . mention bread . answer :",
    "question : what color is the house of omar ? answer :",
    "question : sum up : the dog ran to the river and came back wet . answer :",
)
QUALITY = {"base": 0.37, "sft": 0.62, "ppo-init": 0.58, "ppo": 0.76}
LENGTH = {"base": 18, "sft": 12, "ppo-init": 12, "ppo": 11}


def made_up_samples(
    prompts: int = 60, per_prompt: int = 2, models: tuple[str, ...] = tuple(QUALITY), gold: bool = True, seed: int = 0
) -> pa.Table:
    """Answers with the columns that `evaluate` reads; the gold quality of a model is its QUALITY."""
    rng = np.random.default_rng(seed)
    rows = []
    for model in models:
        for index in range(prompts):
            for sample in range(per_prompt):
                quality = float(np.clip(QUALITY[model] + rng.normal(0, 0.2), -0.3, 1))
                length = 1 + int(rng.poisson(LENGTH[model]))
                rows.append(
                    {
                        "prompt_id": f"p{index:03}",
                        "prompt": PROMPTS[index % len(PROMPTS)],
                        "model": model,
                        "sample": sample,
                        "response": f"the {model} says : bread and {index} " + "word " * max(0, length - 6),
                        "length": length,
                        "finish_reason": "stop" if rng.random() < 0.97 else "length",
                        "reward": 3 * quality - 2 + rng.normal(0, 0.3),
                        "gold": quality if gold else None,
                        "kl": None if model == "base" else float(rng.gamma(2, 0.8)) * (model == "ppo"),
                        "components": {"task": quality, "truth": 0.9, "toxicity": 0.02} if gold else None,
                    }
                )
    return pa.Table.from_pylist(rows)


def made_up_results(gold: bool = True, **options: object) -> Results:
    reward_model = RewardModelResult(
        accuracy=Accuracy(rate=0.764, low=0.741, high=0.787, pairs=1412),
        heldout_labelers=Accuracy(rate=0.741, low=0.712, high=0.77, pairs=933),
        gold_accuracy=Accuracy(rate=0.846, low=0.82, high=0.871, pairs=1412) if gold else None,
        baselines={
            "longer_reply_wins": Accuracy(rate=0.521, low=0.494, high=0.548, pairs=1412),
            "bag_of_words": Accuracy(rate=0.662, low=0.636, high=0.688, pairs=1412),
        },
    )
    return evaluate(
        made_up_samples(gold=gold, **options),  # pyright: ignore[reportArgumentType]
        synthetic=gold,
        reward_model=reward_model,
        pretraining_losses={"base": 0.961, "sft": 1.552, "ppo-init": 1.012, "ppo": 1.004},
    )


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _language_model(path: Path, steps: int, start: float, end: float) -> None:
    rng = np.random.default_rng(steps)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        line = {
            "step": step,
            "time": 1.7e9 + step,
            "loss": end + (start - end) * math.exp(-6 * done) + rng.normal(0, 0.03),
            "lr": 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * done))),
            "grad_norm": abs(rng.normal(1, 0.2)),
            "tokens_per_s": 9800 + rng.normal(0, 300),
            "peak_memory_bytes": 1.4e9,
            "epoch": 16 * done,
        }
        if step % 20 == 0:
            line["valid/loss"] = end + 0.05 + (start - end) * math.exp(-6 * done) + 0.1 * done
        lines.append(line)
    _write_lines(path, lines)


def _reward_model(path: Path) -> None:
    rng = np.random.default_rng(3)
    lines = []
    for step in range(1, 101):
        gained = 1 - math.exp(-step / 60)
        line = {
            "step": step,
            "time": 1.7e9 + step,
            "loss": 0.69 - 0.2 * gained + rng.normal(0, 0.03),
            "lr": 1e-3 * min(1, step / 10),
            "grad_norm": abs(rng.normal(1, 0.2)),
            "tokens_per_s": 7000 + rng.normal(0, 200),
            "peak_memory_bytes": 1.5e9,
        }
        if step % 25 == 0:
            line |= {"valid/accuracy": 0.5 + 0.265 * gained, "valid/loss": 0.69 - 0.18 * gained}
        lines.append(line)
    _write_lines(path, lines)


def _ppo(path: Path, updates: int) -> None:
    rng = np.random.default_rng(4)
    lines = []
    for step in range(1, updates + 1):
        gained = 1 - math.exp(-step / 12)
        kl = 1.9 * gained + rng.normal(0, 0.05)
        lines.append(
            {
                "step": step,
                "time": 1.7e9 + 2 * step,
                "objective/kl": kl,
                "objective/entropy": 14 - 3 * gained + rng.normal(0, 0.3),
                "objective/non_score_reward": -0.05 * kl,
                "objective/rlhf_reward": -0.3 + 0.9 * gained - 0.05 * kl + rng.normal(0, 0.06),
                "objective/scores": -0.3 + 0.9 * gained + rng.normal(0, 0.06),
                "objective/kl_coefficient": 0.05,
                "policy/approxkl_avg": abs(rng.normal(0.004, 0.001)),
                "policy/clipfrac_avg": abs(rng.normal(0.05, 0.01)),
                "policy/entropy_avg": 1.2 - 0.3 * gained + rng.normal(0, 0.02),
                "policy/gradient_norm": abs(rng.normal(0.8, 0.1)),
                "loss/policy_avg": rng.normal(-0.01, 0.004),
                "loss/value_avg": 0.3 * math.exp(-step / 8) + abs(rng.normal(0.05, 0.01)),
                "loss/ptx": 1.01 - 0.01 * gained + rng.normal(0, 0.01),
                "val/clipfrac_avg": abs(rng.normal(0.02, 0.01)),
                "val/ratio": 1 + rng.normal(0, 0.002),
                "val/ratio_var": abs(rng.normal(0.003, 0.001)),
                "val/num_eos_tokens": 126 + rng.integers(0, 3).item(),
                "val/explained_variance": 0.8 * gained + rng.normal(0, 0.04),
                "val/gradient_norm": abs(rng.normal(1.6, 0.3)),
                "lr_value": 3e-4,
                "lr": 1e-4 * min(1, 0.1 + 0.09 * step),
                "episode": 128 * step,
                "response/length_mean": 12.4 - 1.2 * gained + rng.normal(0, 0.15),
                "response/truncated_fraction": abs(rng.normal(0.01, 0.004)),
                "mismatch/max_abs_log_ratio": abs(rng.normal(3e-5, 5e-6)),
                "mismatch/mean_abs_log_ratio": abs(rng.normal(2e-6, 3e-7)),
                "mismatch/probe_nats": abs(rng.normal(1e-5, 2e-6)),
                "staleness/version_lag_mean": 0.0,
                "staleness/version_lag_max": 0.0,
                "time/generate": abs(rng.normal(0.9, 0.05)),
                "time/score": abs(rng.normal(0.2, 0.02)),
                "time/learn": abs(rng.normal(1.4, 0.05)),
                "throughput/episodes_per_second": 58 + rng.normal(0, 2),
                "throughput/tokens_per_second": 700 + rng.normal(0, 25),
                "sync/publish_seconds": abs(rng.normal(0.05, 0.01)),
                "memory/learner_bytes": 1.9e9 + 1e6 * step,
                "memory/generator_bytes": 1.7e9,
                "stream/accepted_waiting": 0.0,
                "stream/regenerated": 0.0,
                "custom/unknown_metric": 1.0 / step,
            }
        )
    _write_lines(path, lines)


def _evaluations(path: Path, gold: bool) -> None:
    rng = np.random.default_rng(5)
    lines = []
    for update in range(0, 49, 4):
        gained = 1 - math.exp(-update / 12)
        lines.append(
            {
                "update": update,
                "episodes": 128 * update,
                "kl": 1.9 * gained + 0.02,
                "reward": -0.3 + 0.9 * gained + rng.normal(0, 0.02),
                "gold": 0.58 + 0.18 * gained + rng.normal(0, 0.008) if gold else None,
                "length": 12.4 - 1.2 * gained,
                "eos_rate": 0.985,
            }
        )
    _write_lines(path, lines)


SECONDS = {
    "base": 138.2,
    "sft": 96.0,
    "round-01/collect": 31.5,
    "round-01/rm": 58.0,
    "round-01/select-sft": 9.4,
    "round-01/ppo-init": 14.1,
    "round-01/ppo": 171.8,
    "round-01/eval": 22.6,
}


def make_run(directory: Path, gold: bool = True) -> Path:
    """A whole made-up run in `directory`; without `gold` one on real data, without base and gold judge."""
    stages = {name: seconds for name, seconds in SECONDS.items() if gold or name != "base"}
    for name, seconds in stages.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "stage.json").write_text(json.dumps({"hash": "0" * 64, "files": {}, "seconds": seconds}))
    first = directory / "round-01"
    if gold:
        _language_model(directory / "base" / "metrics.jsonl", 400, 5.4, 0.96)
    _language_model(directory / "sft" / "metrics.jsonl", 160, 2.1, 0.7)
    _reward_model(first / "rm" / "metrics.jsonl")
    _language_model(first / "ppo-init" / "metrics.jsonl", 90, 1.6, 0.9)
    _ppo(first / "ppo" / "metrics.jsonl", 48)
    _evaluations(first / "ppo" / "evaluations.jsonl", gold)
    models = tuple(QUALITY) if gold else ("sft", "ppo-init", "ppo")
    write_results(made_up_results(gold, models=models), first / "eval" / "results.json")
    pq.write_table(made_up_samples(models=models, gold=gold), first / "eval" / "samples.parquet")
    (first / "select-sft" / "selection.json").write_text('{"epoch": 12, "scores": {"11": 0.31, "12": 0.34}}')
    recipe = RECIPE if gold else RECIPE.replace("corpus: null", "corpus:\n  path: hh")
    (directory / "recipe.yaml").write_text(recipe)
    lineage = {
        "run": "made-up",
        "created": "2026-11-22T10:12:00Z",
        "versions": {"amenable": "0.1.0", "ray": "2.60.0", "torch": "2.13.0", "vllm": "0.32.0", "deepspeed": "0.19.8"},
        "data": {"data/pretraining-train.parquet": "ab" * 32, "data/demonstrations-train.parquet": "cd" * 32},
        "data_sets": {
            "hh": {"licence": "MIT", "licence_from": "recipe"},
            "hub:some/texts": {"licence": "cc-by-4.0", "licence_from": "Hugging Face Hub", "commit": "c0ffee" * 6},
            "mine.jsonl": {"licence": "not stated"},
        },
        "stages": {
            name: {
                "hash": f"{index:x}" * 64,
                "parents": dict.fromkeys(list(stages)[max(0, index - 1) : index], "0" * 64),
                "seconds": seconds,
            }
            for index, (name, seconds) in enumerate(stages.items())
        },
    }
    (directory / "lineage.json").write_text(json.dumps(lineage))
    return directory


@pytest.fixture(scope="session")
def made_up_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether with a gold judge → a run, made once; tests change copies of it."""
    return {gold: make_run(tmp_path_factory.mktemp("runs") / "made-up", gold=gold) for gold in (True, False)}


@pytest.fixture
def run_directory(tmp_path: Path, made_up_runs: dict[bool, Path]) -> Path:
    """A whole synthetic run."""
    return shutil.copytree(made_up_runs[True], tmp_path / "made-up")


@pytest.fixture
def real_run_directory(tmp_path: Path, made_up_runs: dict[bool, Path]) -> Path:
    """A whole run on real data: no base, no gold judge."""
    return shutil.copytree(made_up_runs[False], tmp_path / "made-up")


@pytest.fixture
def samples_of() -> Callable[..., pa.Table]:
    """Makes a table of answers; options of `made_up_samples`."""
    return made_up_samples


@pytest.fixture
def results_of() -> Callable[..., Results]:
    """Makes results; options of `made_up_results`."""
    return made_up_results
