"""The driver of a cell: the real PPO stage on a run directory, with the players of this directory.

`python drive.py RUN` ends as `amenable run` does: exit code 0, or a sentence on standard error and its exit code.
With `--nodes` the Ray session is a cluster that may lose a node; `--updates=N` makes the run as long, with a budget of
restarts that is never spent; `--stale` has staleness 1 and two learner ranks.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import learner
import phases
import players
import ray
import typer
from toy_recipe import recipe_of

from amenable import interruption, pipeline
from amenable.crew import Crew
from amenable.ending import ending
from amenable.progress import Progress
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec
from amenable.stages import ppo
from amenable.stages.context import Context, Stage
from learners import ppo as train_loop

ENDLESS = 1_000_000
"""Restarts that nothing comes to."""


def drive(root: Path, address: str | None, updates: int | None, stale: bool) -> None:
    """Runs the PPO stage of the run in `root`, or goes on with it."""
    phases.register("driver")
    players.enter()
    train_loop.train_ppo = learner.train
    ppo.PUBLICATION_DEADLINE_S = 60.0
    recipe = recipe_of(root, stale=stale) if updates is None else recipe_of(root, updates, ENDLESS, stale)
    run = RunDirectory(root)
    reads = {"seed": recipe.seed, "ppo": recipe.ppo.model_dump(mode="json")}
    stage = Stage("ppo", StageSpec("ppo", run.round(1).ppo, reads), ppo.run)
    with Progress(["ppo"]) as progress, run.lease() as lease:
        storage = phases.cell_directory() / "ray-train"
        with Crew(recipe, storage, progress, address, lease.run_epoch) as crew:
            run.write_recipe(recipe)
            pipeline._run_stage(Context(recipe, run, progress, crew, lease.check), stage)


@contextmanager
def cluster_that_loses_a_node() -> Iterator[str]:
    """The address of a cluster whose workers begin on one node, nearly all; once they are there a second joins, with
    room for all of them, and the first may be lost. Nodes are processes of this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    far: Any = cluster.add_node(num_cpus=4)

    joined: list[subprocess.Popen[bytes]] = []

    def make_room() -> None:
        give_up = time.monotonic() + 240
        while "learner" not in phases.registered() and time.monotonic() < give_up:
            time.sleep(0.1)
        # By the command, since Cluster adds nodes from the main thread alone.
        start = [str(Path(sys.executable).parent / "ray"), "start", f"--address={cluster.address}", "--num-cpus=6"]
        joined.append(subprocess.Popen([*start, "--block"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        while len([node for node in ray.nodes() if node["Alive"]]) < 3 and time.monotonic() < give_up:
            time.sleep(0.1)
        phases.register("node", far.all_processes["raylet"][0].process.pid)

    threading.Thread(target=make_room, daemon=True).start()
    try:
        yield str(cluster.address)
    finally:
        for node in joined:
            node.terminate()
            node.wait(60)
        cluster.shutdown()


def main() -> int:
    """Returns the exit code."""
    lengths = [int(each.removeprefix("--updates=")) for each in sys.argv if each.startswith("--updates=")]
    updates = lengths[0] if lengths else None
    nodes = cluster_that_loses_a_node() if "--nodes" in sys.argv else nullcontext(None)
    try:
        with nodes as address, interruption.listening(), ending(False, lambda: "ppo"):
            drive(Path(sys.argv[1]), address, updates, "--stale" in sys.argv)
    except typer.Exit as end:
        return end.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
