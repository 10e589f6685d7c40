"""`python -m bench.ppo`: how fast PPO is on this machine, and what share of the machine's ceiling that is.

Each workload is a run of `amenable ppo` in a process of its own, on a run directory whose earlier stages are
fabricated, so what is timed is what a user's command does. The ceiling is measured before and after it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ceiling import ceilings
from bench.figures import Work, gflops, measured, rows, useful_fraction
from bench.workload import (
    BATCH_SIZE,
    DOCUMENT_TOKENS,
    PROMPT_TOKENS,
    WORKLOADS,
    Dtype,
    Options,
    Workload,
    fabricate,
    recipe_for,
)

DEADLINE_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the workloads that are asked for, prints what came of them, and returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.updates < 2 or asked.warm_up < 2:
        parser.error("--updates and --warm-up are at least 2")
    dtype: Dtype = _faster_dtype() if asked.dtype == "auto" else asked.dtype
    updates = asked.updates + asked.warm_up + 1
    workloads = list(WORKLOADS.values()) if asked.workload == "both" else [WORKLOADS[asked.workload]]
    answers = []
    for workload, ptx in itertools.product(workloads, [False, True] if asked.ptx == "both" else [asked.ptx == "on"]):
        options = Options(ptx, asked.staleness, dtype, asked.threads, updates, asked.warm_up)
        _say(f"Workload {workload.name}: {workload.says}; {_settings(options)}.")
        with tempfile.TemporaryDirectory(prefix="amenable-bench-") as temporary:
            directory = Path(asked.directory or temporary) / f"{workload.name}-ptx-{_on_or_off(ptx)}"
            directory.mkdir(parents=True)
            answers.append(run(workload, options, directory))
        if not asked.json:
            _tell(answers[-1], options)
    if asked.json:
        print(json.dumps(answers, indent=2))
    return 0


def run(workload: Workload, options: Options, directory: Path) -> dict[str, Any]:
    """Measures one workload in the empty `directory`; returns settings, ceiling and figures as plain values.

    Raises subprocess.CalledProcessError where the run failed; it has said why on standard error.
    """
    recipe = recipe_for(workload, options, directory)
    parameters = fabricate(workload, recipe, directory)
    pretraining = recipe.ppo.ptx_per_episode * DOCUMENT_TOKENS if options.ptx else 0
    _say("measuring the ceiling")
    load, before = os.getloadavg()[0], ceilings()
    run_directory = directory / "run"
    started_at = time.time()
    subprocess.run(
        [sys.executable, "-m", "amenable", "ppo", str(run_directory / "recipe.yaml"), "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )
    _say("measuring the ceiling again")
    after = ceilings()
    lines = (run_directory / "round-01" / "ppo" / "metrics.jsonl").read_text().splitlines()
    ceiling = {dtype: max(before[dtype], after[dtype]) for dtype in before}
    work = Work(parameters, BATCH_SIZE, PROMPT_TOKENS, pretraining)
    figures = measured([json.loads(line) for line in lines], work, options.warm_up, started_at)
    return {
        "workload": workload.name,
        **asdict(options),
        "parameters": parameters,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "ceiling_gflops": {dtype: {"before": before[dtype] / 1e9, "after": after[dtype] / 1e9} for dtype in before},
        "useful_fraction": {dtype: useful_fraction(figures, ceiling[dtype]) for dtype in ceiling},
        "figures": asdict(figures),
        "table": rows(figures, ceiling, options.ptx),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ppo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", choices=["A", "B", "both"], default="both")
    parser.add_argument(
        "--ptx", choices=["on", "off", "both"], default="both", help="the pretraining term (8 texts an episode)"
    )
    parser.add_argument("--staleness", type=int, choices=[0, 1], default=0, help="0: strictly on-policy")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of learner, rollouts and scoring; auto: the one in which this machine multiplies matrices faster",
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the learner (default: all cores)"
    )
    parser.add_argument("--updates", type=int, default=6, help="updates that are measured, at least 2")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before them, which are not, at least 2")
    parser.add_argument("--directory", help="keep the runs here (must not hold one yet) instead of a temporary place")
    parser.add_argument("--json", action="store_true", help="one JSON answer on standard output")
    return parser


def _faster_dtype() -> Dtype:
    found = ceilings()
    return "bfloat16" if found["bfloat16"] > found["float32"] else "float32"


def _on_or_off(ptx: bool) -> str:
    return "on" if ptx else "off"


def _settings(options: Options) -> str:
    return f"ptx {_on_or_off(options.ptx)}, staleness {options.staleness}, {options.dtype}, {options.threads} threads"


def _tell(answer: dict[str, Any], options: Options) -> None:
    print(f"\nWorkload {answer['workload']} ({WORKLOADS[answer['workload']].says}); {_settings(options)}")
    print(
        f"{answer['parameters']:,} parameters, {BATCH_SIZE} episodes an update, {answer['cores']} cores, load "
        f"{answer['load_before']:.1f} before"
    )
    for dtype, found in answer["ceiling_gflops"].items():
        print(f"ceiling in {dtype}: {gflops(found['before'])}, {gflops(found['after'])} after")
    for name, value in answer["table"]:
        print(f"  {name:24}{value}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
