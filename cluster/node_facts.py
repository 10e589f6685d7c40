"""What there is on a node, as a process on it finds: Python, packages, what imports, GPUs, environment variables.

Runs on nodes that may lack everything: it imports only what Python itself has, and what fails is a fact.
"""

import importlib
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODULES = ("torch", "transformers", "deepspeed", "vllm", "learners.rank", "actors.generator", "actors.scoring")
"""What workers import: the stack, and the rooms of this program that run on nodes."""

DEVICES_DEADLINE_S = 60.0
"""Seconds for nvidia-smi to answer; a node whose driver hangs does not keep the doctor. House default."""

_DEVICES = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Device:
    """A GPU of a node, whoever uses it."""

    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class NodeFacts:
    """What was found on a node."""

    python: str
    packages: dict[str, str]
    """Versions by package; what is not installed is left out."""
    imports: dict[str, str]
    """By module, what went wrong; an empty text where it could be imported."""
    devices: tuple[Device, ...] = ()
    devices_problem: str = ""
    """Why the GPUs could not be asked for, where there is a driver."""
    cuda: str = ""
    """The version of CUDA that torch was built for; empty for a build for CPUs."""
    usable_gpus: int = 0
    """GPUs that torch can use."""
    missing_variables: tuple[str, ...] = ()
    """Of the environment variables that were asked for, those that are not set, or empty."""
    memory_bytes: int = 0
    """Memory of the node, or of the container that its Ray processes are in."""


def gather(packages: Sequence[str], modules: Sequence[str], variables: Sequence[str]) -> NodeFacts:
    """The facts of the node that this process is on. Imports `modules`, so the process had better end afterwards."""
    # Ray hides GPUs from a task that reserves none; whether torch could use them is what is asked.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    imports = {module: _import(module) for module in modules}
    devices, problem = _devices()
    cuda, usable = _torch() if imports.get("torch") == "" else ("", 0)
    return NodeFacts(
        python=platform.python_version(),
        packages={name: found for name in packages if (found := installed(name)) is not None},
        imports=imports,
        devices=devices,
        devices_problem=problem,
        cuda=cuda,
        usable_gpus=usable,
        missing_variables=tuple(name for name in variables if not os.environ.get(name)),
        memory_bytes=memory_here(),
    )


def installed(package: str) -> str | None:
    """The version of an installed package; vLLM's CPU build is another distribution of it. None where there is none."""
    for distribution in (package, f"{package}-cpu") if package == "vllm" else (package,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def memory_here(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory that processes here may use: the machine's, or the control group's `limit` where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(limit.read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is none, or it says "max"
        return machine


def devices_in(output: str) -> tuple[Device, ...]:
    """The GPUs in what nvidia-smi printed. Raises ValueError where it is not what was asked for."""
    found = []
    for line in filter(None, (line.strip() for line in output.splitlines())):
        name, memory, driver = (part.strip() for part in line.split(","))
        found.append(Device(name, int(memory), driver))
    return tuple(found)


def _devices() -> tuple[tuple[Device, ...], str]:
    try:
        ended = subprocess.run(_DEVICES, capture_output=True, text=True, timeout=DEVICES_DEADLINE_S, check=False)
        if ended.returncode != 0:
            return (), " ".join((ended.stderr or ended.stdout).split())[:200] or f"exit code {ended.returncode}"
        return devices_in(ended.stdout), ""
    except FileNotFoundError:
        return (), ""  # no driver, no GPUs: what is needed is known to whoever asks
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi gave no answer within {DEVICES_DEADLINE_S:.0f} s"
    except ValueError as error:
        return (), f"nvidia-smi answered something else ({error})"


def _import(module: str) -> str:
    try:
        importlib.import_module(module)
    except BaseException as error:  # noqa: BLE001 - whatever a broken package raises, SystemExit too, is the fact
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _torch() -> tuple[str, int]:
    torch = importlib.import_module("torch")
    return torch.version.cuda or "", int(torch.cuda.device_count())
