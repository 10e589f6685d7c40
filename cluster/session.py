"""The Ray session of a command: a local one that ends with it, or a cluster's by its address."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import ray

from cluster.address import Unreachable, check_cluster
from cluster.patience import call_within
from cluster.under_job import job_variables
from corpus import logs
from corpus.problems import RunProblem
from corpus.telemetry import TELEMETRY_OFF

ENVIRONMENT = {
    **TELEMETRY_OFF,
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_memory_monitor_refresh_ms": "1000",
    # Ray's control service remembers so many calls of actors, of 3.5 KiB each; by itself 100,000.
    "RAY_task_events_max_num_task_in_gcs": "2000",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set where the person has not set them; a local session's workers inherit them."""

CONNECT_DEADLINE_S = 45.0
"""Seconds for a cluster whose port answers to take this command in. Ray itself tries for nine minutes."""

STARTS = 3
"""Times that a local session is tried. Ray gives its processes 30 s, which is short on a machine that is busy."""

_TOO_SLOW = "timed out during startup"
"""In what ray.init says where these seconds were not enough (ray/_private/node.py)."""


@contextmanager
def session(
    address: str | None,
    cpus: int,
    object_store_mib: int = 256,
    meanwhile: Callable[[], None] = lambda: None,
    run: str = "",
) -> Iterator[None]:
    """Ray for the block: the cluster at `address`, or, without one, a session of this machine that ends with it.

    A local session offers `cpus` CPUs whatever the machine has: on a small one the roles take turns on its cores.
    `meanwhile` is called again and again while a cluster is waited for; what it raises ends the wait. Log lines of what
    is started here say that they are of `run`. Raises
    UsageProblem where `address` cannot be a cluster's, Unreachable where a cluster does not answer, RunProblem where no
    local session starts.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.update(logs.told_to_workers(run))
        _start_local(cpus, object_store_mib)
    else:
        check_cluster(address)
        _join(address, meanwhile, run)
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(cpus: int, object_store_mib: int) -> None:
    _give_token()
    for left in reversed(range(STARTS)):
        before = {each.pid for each in psutil.Process().children(recursive=True)}
        try:
            ray.init(
                address="local",  # else Ray takes a cluster that it finds on this machine, or RAY_ADDRESS
                num_cpus=cpus,
                _node_ip_address="127.0.0.1",  # Ray takes it for this machine: its ports are open on all interfaces
                include_dashboard=False,
                object_store_memory=object_store_mib << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="amenable",
            )
            return
        except Exception as error:  # Ray raises a plain one where its processes are slow to start
            if _TOO_SLOW not in str(error) or not left:
                raise RunProblem(f"Could not start a local Ray session: {error}", "cluster/session") from error
            for each in psutil.Process().children(recursive=True):
                if each.pid not in before:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()


def _give_token() -> None:
    """Gives a local session a token that lives as long as this process: its ports are open on all interfaces, and Ray
    has a new session ask for one. Without this it would be written into the person's home. Own settings stay."""
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _join(address: str, meanwhile: Callable[[], None], run: str) -> None:
    """Connects to a cluster."""
    # Its processes have not this one's environment. Ray refuses a variable that the job has set already, of this value.
    told = {name: value for name, value in logs.told_to_workers(run).items() if name not in job_variables()}

    def join() -> None:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="amenable",
            runtime_env={"env_vars": told} if run and told else None,
        )

    try:
        failure = call_within(CONNECT_DEADLINE_S, join, meanwhile)
    except TimeoutError:
        raise Unreachable(
            f"The Ray cluster at {address} did not take this command in within {CONNECT_DEADLINE_S:.0f} s: is that "
            "the port of its head (6379 unless it was started with another), and its Ray and Python those of here?",
            "cluster/unreachable",
        ) from None
    if failure is not None:
        reason = " ".join(str(failure).split())
        raise Unreachable(
            f"Could not connect to the Ray cluster at {address}: {reason}", "cluster/unreachable"
        ) from failure
