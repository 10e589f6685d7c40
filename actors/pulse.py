"""A worker's sign of life, and the end of a process that gives none: a stopped one does not hear that it is to go."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Pulse:
    """What a worker says of itself. `process` tells its process from a later one with the same number `pid`; `node` is
    Ray's id of its machine, empty outside Ray; `stalled_s` are the seconds for which what it is at has not got on."""

    pid: int
    process: str
    node: str
    stalled_s: float
    memory_bytes: int


def pulse_now(stalled_s: float) -> Pulse:
    """The pulse of this process."""
    pid = os.getpid()
    return Pulse(pid, started_at(pid) or "", this_node(), stalled_s, resident_bytes())


def resident_bytes() -> int:
    """The memory of this process that is resident on its machine now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def this_node() -> str:
    """Ray's id of the machine that this runs on; empty outside Ray."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def started_at(pid: int) -> str | None:
    """When the process `pid` of this machine started, in ticks since its boot; None where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return status.rpartition(")")[2].split()[19]  # proc(5), field 22; the command's name may hold spaces and brackets


def end_process(pulse: Pulse) -> bool:
    """Ends the process on this machine; returns whether it was there. One that merely has its number is left alone."""
    if not pulse.process or started_at(pulse.pid) != pulse.process:
        return False
    try:
        os.kill(pulse.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill(actor: object, pulse: Pulse | None) -> None:
    """Ends an actor, wherever it runs; `pulse` is its last one. Returns at once."""
    ray.kill(actor)  # pyright: ignore[reportArgumentType] - a handle
    if pulse is None:
        return
    if pulse.node == this_node():
        end_process(pulse)
    elif pulse.node:
        there = NodeAffinitySchedulingStrategy(pulse.node, soft=False)
        ray.remote(end_process).options(num_cpus=0, scheduling_strategy=there).remote(pulse)
