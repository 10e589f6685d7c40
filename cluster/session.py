"""The Ray session of a command: a local one that ends with it, or a cluster's by its address."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from corpus.problems import RunProblem

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_memory_monitor_refresh_ms": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set where the person has not set them; a local session's workers inherit them."""


@contextmanager
def session(address: str | None, cpus: int, object_store_mib: int = 256) -> Iterator[None]:
    """Ray for the block: the cluster at `address`, or, without one, a session of this machine that ends with it.

    A local session offers `cpus` CPUs whatever the machine has: on a small one the roles take turns on its cores.
    Raises RunProblem where a cluster does not answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        # A local session is this process's own; a token would be written into the person's home for nothing.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        if address is None:
            ray.init(
                num_cpus=cpus,
                _node_ip_address="127.0.0.1",  # nothing of a local session is reachable from elsewhere
                include_dashboard=False,
                object_store_memory=object_store_mib << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="amenable",
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="amenable")
    except Exception as error:  # Ray raises a plain one where its processes are slow to start
        where = f"the Ray cluster at {address}" if address else "a local Ray session"
        raise RunProblem(f"Could not connect to {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
