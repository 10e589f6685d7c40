"""`python -m bench.trl`: TRL's PPOTrainer on the workloads of `bench.ppo`, so that both are timed by one machine.

TRL is no dependency of this program. Beside the environment it wants
`pip install --no-deps --target DIR trl==1.10.0 accelerate datasets multiprocess xxhash` and PYTHONPATH=DIR; 1.10 is
the last line of releases with a PPO trainer. Its defaults stand but for the sizes of the workload: one inner epoch, 8
minibatches, the same networks, no saving and no sample tables.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.ceiling import ceilings
from bench.figures import PASSES, gflops
from bench.workload import (
    BATCH_SIZE,
    EOS,
    MINIBATCHES,
    PROMPT_TOKENS,
    WORKLOADS,
    Options,
    Workload,
    fabricate,
    recipe_for,
)

ROWS_PER_PASS = 16
"""Rows of a forward and backward pass: a minibatch, which is as many as fit one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs TRL on the workloads that are asked for, prints episodes a second, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.trl", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=["A", "B", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--updates", type=int, default=6, help="updates that are measured")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before them, which are not")
    parser.add_argument("--json", action="store_true", help="one JSON answer on standard output")
    asked = parser.parse_args(arguments)
    chosen = list(WORKLOADS.values()) if asked.workload == "both" else [WORKLOADS[asked.workload]]
    options = Options(False, 0, asked.dtype, asked.threads, asked.updates + asked.warm_up, asked.warm_up)
    answers = [run(workload, options) for workload in chosen]
    if asked.json:
        print(json.dumps(answers, indent=2))
        return 0
    for answer in answers:
        print(
            f"TRL {answer['trl']}, workload {answer['workload']}, {asked.dtype}, {asked.threads} threads: "
            f"{answer['episodes_per_s']:.2f} episodes/s, {_shares(answer)} (responses of {answer['response_tokens']} "
            "tokens)"
        )
    return 0


def run(workload: Workload, options: Options) -> dict[str, Any]:
    """Times one workload; returns episodes a second and what they come to. Raises ImportError without TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset  # pyright: ignore
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore

    from corpus.schemas import read_table

    times: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each update ends."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="amenable-bench-") as temporary:
        directory = Path(temporary)
        recipe = recipe_for(workload, options, directory)
        parameters = fabricate(workload, recipe, directory)
        first = Path(recipe.run_directory) / "round-01"
        dtype = getattr(torch, options.dtype)
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(first / "ppo-init" / "export", dtype=dtype) for _ in range(2)
        )
        reward, value = (
            AutoModelForSequenceClassification.from_pretrained(first / "rm" / "export", dtype=dtype) for _ in range(2)
        )
        prompts = read_table(str(Path(recipe.run_directory) / "data" / "prompts-ppo.parquet"), "prompts")
        dataset = Dataset.from_dict({"input_ids": prompts["prompt_tokens"].to_pylist()})
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=str(directory / "trl"),
                total_episodes=options.updates * BATCH_SIZE,
                per_device_train_batch_size=ROWS_PER_PASS,
                gradient_accumulation_steps=BATCH_SIZE // ROWS_PER_PASS,
                num_mini_batches=MINIBATCHES,
                num_ppo_epochs=1,
                local_rollout_forward_batch_size=BATCH_SIZE,
                response_length=workload.max_response_tokens,
                stop_token_id=EOS,
                temperature=1.0,
                learning_rate=recipe.ppo.policy.peak_lr,
                num_sample_generations=0,
                save_strategy="no",
                report_to=[],
                bf16=False,  # the networks are in the dtype already
                use_cpu=True,
                seed=0,
            ),
            AutoTokenizer.from_pretrained(Path(recipe.run_directory) / "data" / "tokenizer"),
            policy,
            reference,
            reward,
            dataset,
            value,
            eval_dataset=dataset.select(range(8)),
            callbacks=[Clock()],
        )
        before = ceilings()
        trainer.train()
        after = ceilings()
    seconds = times[-1] - times[options.warm_up - 1]
    episodes_per_s = (len(times) - options.warm_up) * BATCH_SIZE / seconds
    # It generates to the full length and cuts at end-of-text afterwards: what comes after it is not useful.
    useful_tokens = PROMPT_TOKENS + (workload.max_response_tokens if workload.name == "A" else 32)
    ceiling = {dtype: max(before[dtype], after[dtype]) for dtype in before}
    useful = episodes_per_s * PASSES * 2.0 * parameters * useful_tokens
    return {
        "trl": version("trl"),
        "workload": workload.name,
        "episodes_per_s": episodes_per_s,
        "response_tokens": workload.max_response_tokens,
        "ceiling_gflops": {dtype: flops / 1e9 for dtype, flops in ceiling.items()},
        "useful_fraction": {dtype: useful / flops for dtype, flops in ceiling.items()},
    }


def _shares(answer: dict[str, Any]) -> str:
    ceilings_of = answer["ceiling_gflops"].items()
    return ", ".join(f"{answer['useful_fraction'][dtype]:.3f} of {gflops(of)} {dtype}" for dtype, of in ceilings_of)


if __name__ == "__main__":
    sys.exit(main())
