"""The doctor's checks: pure functions from facts to findings, each of which names the node and what would be right."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster.node_facts import NodeFacts
from cluster.supported import SAME_IMPORT, Supported, is_older, is_supported, minimum_driver

State = Literal["ok", "unknown", "failed"]


@dataclass(frozen=True)
class Finding:
    """What one check found. `unknown` does not keep a run from starting: it is told, and a deadline follows."""

    check: str
    state: State
    says: str
    for_good: bool = False
    """Whether it failed and would on every cluster with nodes like these, wherever processes are placed on them."""

    def as_json(self) -> dict[str, Any]:
        """The finding as `--json` tells it."""
        return asdict(self)


Facts = Mapping[str, NodeFacts]
"""What was found on each node that answered, by the node's name."""


def check_answers(nodes: Sequence[str], problems: Mapping[str, str]) -> Finding:
    """Whether every node told its facts. `problems` says of those that did not what happened."""
    if not nodes:
        return Finding("nodes", "failed", "The cluster has no node that is alive.")
    wrong = [f"{node}: {problem}" for node, problem in problems.items()]
    return _finding("nodes", wrong, f"{_count(len(nodes), 'node')}: every one runs this program's code")


def check_python(facts: Facts, supported: Supported) -> Finding:
    """Whether every node has a supported Python, and all the same: what travels between them is pickled."""
    wrong = [
        f"{node} has Python {fact.python}, and the program is for {supported.python}"
        for node, fact in facts.items()
        if not is_supported(fact.python, supported.python)
    ]
    minors = sorted({fact.python.rpartition(".")[0] for fact in facts.values()})
    if not wrong and len(minors) > 1:
        wrong.append(f"the nodes have Python {' and '.join(minors)}: give all of them the same")
    versions = ", ".join(sorted({fact.python for fact in facts.values()}))
    return _finding("python", wrong, f"Python {versions}")


def check_packages(facts: Facts, supported: Supported) -> Finding:
    """Whether every node has a supported version of each package of the stack."""
    wrong = []
    for node, fact in facts.items():
        for package, specifier in supported.packages.items():
            version = fact.packages.get(package)
            if version is None:
                names = " or ".join([package, *(other for other, same in SAME_IMPORT.items() if same == package)])
                wrong.append(f"{node} has no {names} {specifier}")
            elif not is_supported(version, specifier):
                wrong.append(f"{node} has {package} {version}, and the program is for {specifier}")
    told = ", ".join(f"{package} {specifier.removeprefix('==')}" for package, specifier in supported.packages.items())
    return _finding("packages", wrong, told)


def check_imports(facts: Facts) -> Finding:
    """Whether every node can import the stack and this program's workers."""
    wrong = [
        f"{node} cannot import {module} ({problem})"
        for node, fact in facts.items()
        for module, problem in fact.imports.items()
        if problem
    ]
    return _finding("imports", wrong, ", ".join(next(iter(facts.values())).imports) if facts else "")


def check_devices(facts: Facts, declared_gpus: Mapping[str, float]) -> Finding:
    """Whether every node has the GPUs that Ray was told of (`declared_gpus`, by node), and torch can use them."""
    wrong = []
    for node, fact in facts.items():
        declared = declared_gpus.get(node, 0.0)
        if fact.devices_problem:
            wrong.append(f"{node}: its GPUs cannot be asked for ({fact.devices_problem})")
        elif declared > len(fact.devices):
            wrong.append(f"{node} declares {declared:g} GPUs to Ray, and its driver shows {len(fact.devices)}")
        elif declared and not fact.cuda:
            wrong.append(f"{node} has GPUs, and its torch is a build for CPUs: install the gpu extra there")
        elif declared > fact.usable_gpus:
            wrong.append(f"{node} declares {declared:g} GPUs to Ray, and torch can use {fact.usable_gpus}")
    gpus = [device for fact in facts.values() for device in fact.devices]
    kinds = sorted({f"{device.name} ({device.memory_mib / 1024:.0f} GiB)" for device in gpus})
    return _finding("devices", wrong, f"{_count(len(gpus), 'GPU')}: {', '.join(kinds)}" if gpus else "no GPUs")


def check_driver(facts: Facts) -> Finding:
    """Whether the driver of every node with GPUs is new enough for the CUDA that its torch was built for."""
    wrong, told = [], set[str]()
    for node, fact in facts.items():
        minimum = minimum_driver(fact.cuda)
        for driver in sorted({device.driver for device in fact.devices}) if fact.cuda else ():
            told.add(f"driver {driver} for CUDA {fact.cuda}")
            if minimum is None:
                wrong.append(f"{node}: torch was built for CUDA {fact.cuda}, which is not in the supported table")
            elif is_older(driver, minimum):
                wrong.append(f"{node} has driver {driver}, and CUDA {fact.cuda} needs {minimum} or newer")
    return _finding("driver", wrong, ", ".join(sorted(told)) or "none is needed")


def check_variables(facts: Facts, variables: Sequence[str]) -> Finding:
    """Whether every node has the environment variables that were named with --env."""
    wrong = [
        f"{node} has no {' and no '.join(fact.missing_variables)} in the environment of its Ray processes"
        for node, fact in facts.items()
        if fact.missing_variables
    ]
    return _finding("environment", wrong, ", ".join(variables) or "no variable is asked for")


def check_storage(
    place: str, operations: Mapping[str, Mapping[str, str]], unseen: Mapping[str, str], local: bool
) -> Finding:
    """Whether every node can do at `place` what a run does there, and all see each other's files.

    `operations` is by node and operation what went wrong (empty: nothing); `unseen`, by node, why the driver's file is
    not seen there, or the node's not by the driver (empty: it is). `local` says that it is a directory.
    """
    wrong = [
        f"{node}: {operation} failed ({problem})"
        for node, tried in operations.items()
        for operation, problem in tried.items()
        if problem and not problem.startswith("not tried")
    ]
    hidden = [f"{node} ({why})" for node, why in unseen.items() if why]
    if hidden and not wrong:
        remedy = "mount the same disk at this path on every node" if local else "is it the same store for every node?"
        wrong.append(f"it is not one place for all nodes: files are not seen from or by {', '.join(hidden)}; {remedy}")
    done = list(next(iter(operations.values()))) if operations else []
    found = _finding("storage", wrong, f"{', '.join(done)}, from every node")
    return Finding("storage", found.state, f"{place}: {found.says}")


@dataclass(frozen=True)
class Need:
    """What one process of a role is reckoned to take: bytes of its device, of each where it has several (of its node,
    where it has no GPU), bytes of its node's memory beside that, and the GPUs it reserves."""

    role: str
    device_bytes: int
    node_bytes: int = 0
    gpus: float = 0.0


def check_memory(needs: Sequence[Need], places: Mapping[int, str], facts: Facts) -> Finding:
    """Whether the processes fit where there is room for them: each into its share of a GPU, and all of a node's into
    its memory. `places` are the nodes of the processes, by their position in `needs`."""
    told = ", ".join(f"{role} {_gib(size)}" for role, size in {need.role: need.device_bytes for need in needs}.items())
    if len(places) < len(needs) or not set(places.values()) <= set(facts):
        return Finding("memory", "unknown", f"reckoned: {told}; not all have a node yet to compare with")
    wrong = []
    for at, node in sorted(places.items()):
        need = needs[at]
        if need.gpus:
            have = (
                round(min(need.gpus, 1.0) * min((device.memory_mib for device in facts[node].devices), default=0)) << 20
            )
            if need.device_bytes > have:
                wrong.append(f"{need.role} takes {_gib(need.device_bytes)}, and its GPUs of {node} have {_gib(have)}")
    for node in dict.fromkeys(places.values()):
        there = [need for at, need in enumerate(needs) if places[at] == node]
        size = sum(need.node_bytes if need.gpus else need.device_bytes + need.node_bytes for need in there)
        if size > facts[node].memory_bytes:
            roles = ", ".join(dict.fromkeys(need.role for need in there))
            wrong.append(f"{roles} take {_gib(size)} together, and {node} has {_gib(facts[node].memory_bytes)}")
    found = _finding("memory", list(dict.fromkeys(wrong)), f"reckoned: {told}")
    nodes = facts.values()
    return replace(found, for_good=bool(wrong) and not all(any(_holds(node, need) for node in nodes) for need in needs))


def _holds(node: NodeFacts, need: Need) -> bool:
    """Whether a node with nothing else on it has the memory for one process."""
    if not need.gpus:
        return need.device_bytes + need.node_bytes <= node.memory_bytes
    share = min(need.gpus, 1.0) * max((device.memory_mib for device in node.devices), default=0)
    return need.device_bytes <= round(share) << 20 and need.node_bytes <= node.memory_bytes


def failed(findings: Sequence[Finding]) -> list[Finding]:
    """Those that keep a run from starting."""
    return [finding for finding in findings if finding.state == "failed"]


def _finding(check: str, wrong: Sequence[str], right: str) -> Finding:
    return Finding(check, "failed", "; ".join(wrong)) if wrong else Finding(check, "ok", right)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
