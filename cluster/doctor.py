"""Asks every node of a cluster for its facts, tries the storage from each, and waits for room. Nothing is reserved.

Each question is a task without resources, bound to its node, in a worker process that ends after it: what a node
imports for the answer does not stay in its memory, and a package that crashes on import ends no worker of a run.
"""

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.bundles import bundle_of
from cluster.capacity import Capacity, capacity_now
from cluster.checks import (
    Finding,
    check_answers,
    check_devices,
    check_driver,
    check_imports,
    check_packages,
    check_python,
    check_storage,
    check_variables,
)
from cluster.node_facts import MODULES, NodeFacts, gather
from cluster.packing import Bundle
from cluster.room import check_room, could_be_freed, pending
from cluster.storage_probe import DRIVERS, probe, seen
from cluster.supported import STACK, Supported
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, is_object_store, one_line, opened

FACTS_DEADLINE_S = 300.0
"""Seconds for a node to import the stack and answer. House default: vLLM takes 20 on a cold disk."""

STORAGE_DEADLINE_S = 120.0
"""Seconds for a node to try the storage. House default; a mount that hangs is seen by it."""

CAPACITY_DEADLINE_S = 60.0
"""Seconds for the cluster to say what it has free."""

FREED_DEADLINE_S = 60.0
"""Seconds for room that others take to become free: an attempt that was stopped gives its own back within some."""

SCALED_DEADLINE_S = 1800.0
"""Seconds for an autoscaler to add nodes. House default: a GPU node with a large image takes up to a quarter hour."""

LOOK_S = 1.0

Meanwhile = Callable[[], None]
"""Called again and again while something is waited for; what it raises ends the wait."""


def capacity(meanwhile: Meanwhile = lambda: None) -> Capacity:
    """What the cluster has free. Raises RunProblem where it does not say in time."""
    task: Any = ray.remote(capacity_now)
    answers, problems = _answers({task.options(num_cpus=0).remote(): "the cluster"}, CAPACITY_DEADLINE_S, meanwhile)
    if problems:
        raise RunProblem(f"The cluster does not say what it has free: {problems['the cluster']}.", "cluster/no-answer")
    return answers["the cluster"]


def examine_nodes(
    found: Capacity, supported: Supported, variables: Sequence[str], meanwhile: Meanwhile = lambda: None
) -> tuple[list[Finding], dict[str, NodeFacts]]:
    """Findings about every node: whether it answers, its Python, packages, imports, GPUs, driver and environment; and
    the facts of those that answered."""
    names = {number: room.node for number, room in found.rooms.items()}
    arguments = {number: (STACK, MODULES, tuple(variables)) for number in names}
    facts, problems = _on_nodes(gather, arguments, names, FACTS_DEADLINE_S, meanwhile)
    findings = [check_answers(list(names.values()), problems)]
    if not facts:
        return findings, {}
    gpus = {room.node: room.total_gpus for room in found.rooms.values()}
    return [*findings, *findings_of(facts, supported, gpus, variables)], facts


def findings_of(
    facts: Mapping[str, NodeFacts], supported: Supported, gpus: Mapping[str, float], variables: Sequence[str]
) -> list[Finding]:
    """The findings from the facts of nodes. `gpus` are those that Ray was told of, by node."""
    return [
        check_python(facts, supported),
        check_packages(facts, supported),
        check_imports(facts),
        check_devices(facts, gpus),
        check_driver(facts),
        check_variables(facts, variables),
    ]


def examine_storage(found: Capacity, place: str, meanwhile: Meanwhile = lambda: None) -> Finding:
    """Whether `place`, a directory (absolute) or an address, does what a run asks of it, from every node and as one
    place for all. What is written for that is removed again."""
    names = {number: room.node for number, room in found.rooms.items()}

    def ask(trial: str, nonce: str) -> tuple[dict[str, tuple[dict[str, str], str]], dict[str, str]]:
        arguments = {number: (trial, number, nonce) for number in names}
        return _on_nodes(_try_storage, arguments, names, STORAGE_DEADLINE_S, meanwhile)

    return _examined(place, names, ask)


def try_here(place: str) -> Finding:
    """The same for this process alone."""
    return _examined(place, {"here": "here"}, lambda trial, nonce: ({"here": _try_storage(trial, "here", nonce)}, {}))


def _examined(
    place: str,
    names: Mapping[str, str],
    ask: Callable[[str, str], tuple[dict[str, tuple[dict[str, str], str]], dict[str, str]]],
) -> Finding:
    nonce = uuid.uuid4().hex
    try:
        with _trial(place, nonce) as trial:
            answers, problems = ask(trial, nonce)
            operations = {node: tried for node, (tried, _) in answers.items()}
            unseen = {node: theirs for node, (_, theirs) in answers.items()}
            for number, node in names.items():
                if node in answers and not any(operations[node].values()):
                    unseen[node] = unseen[node] or seen(trial, number, nonce)
    except (OSError, UsageProblem) as error:
        return Finding("storage", "failed", f"{_shown(place)}: it cannot be written to from here ({one_line(error)})")
    operations |= {node: {"trying the storage": problem} for node, problem in problems.items()}
    return check_storage(_shown(place), operations, unseen, not is_object_store(place))


def await_room(
    bundles: Sequence[Bundle],
    note: Callable[[str], None],
    meanwhile: Meanwhile,
    freed_s: float = FREED_DEADLINE_S,
    scaled_s: float = SCALED_DEADLINE_S,
    look: Callable[[Meanwhile], Capacity] | None = None,
    ask: Callable[[Sequence[Bundle]], None] | None = None,
) -> Finding:
    """The placement of `bundles` once it is settled: `ok`, or `failed`.

    Room that others take is waited for `freed_s` seconds, nodes of an autoscaler, which is asked for them, `scaled_s`;
    then the finding says which bundles are pending.
    """
    look, ask = look or capacity, ask or _ask_autoscaler
    began = time.monotonic()
    said, asked = "", False
    try:
        while True:
            found = look(meanwhile)
            rooms = list(found.rooms.values())
            finding = check_room(bundles, rooms, found.groups)
            is_busy = finding.state == "failed" and could_be_freed(bundles, rooms)
            if finding.state == "ok" or (finding.state == "failed" and not is_busy):
                return finding
            if finding.state == "unknown" and found.groups is not None and not asked:
                ask(bundles)
                asked = True
            patience_s = freed_s if is_busy or found.groups is None else scaled_s
            if time.monotonic() - began > patience_s:
                waited = f"after {patience_s:.0f} s these still wait for room: {pending(bundles, rooms)}"
                return Finding("placement", "failed", f"{finding.says}; {waited}")
            if finding.says != said:
                said = finding.says
                note(f"waiting for room: {said}")
            _sleep(meanwhile)
    finally:
        if asked:
            ask([])  # else the autoscaler would keep room for these for ever


def _try_storage(trial: str, node: str, nonce: str) -> tuple[dict[str, str], str]:
    """On a node: what went wrong by operation, and why the driver's file is not seen. A node that does not even have
    the directory is not told of every operation that fails in it."""
    theirs = seen(trial, DRIVERS, nonce)
    is_elsewhere = bool(theirs) and not is_object_store(trial) and not Path(trial).is_dir()
    return ({} if is_elsewhere else probe(trial, node, nonce)), theirs


@contextmanager
def _trial(place: str, nonce: str) -> Iterator[str]:
    """A directory below `place` with the driver's file in it; after the block it is gone, with what was made for it."""
    trial = below(place, f".doctor-{nonce}")
    if is_object_store(place):
        filesystem, inner = opened(trial)
        with filesystem.open_output_stream(f"{inner}/{DRIVERS}") as stream:
            stream.write(nonce.encode())
        try:
            yield trial
        finally:
            filesystem.delete_dir(inner)
        return
    made = [path for path in (Path(place), *Path(place).parents) if not path.exists()]
    try:
        Path(trial).mkdir(parents=True)
        (Path(trial) / DRIVERS).write_bytes(nonce.encode())
        yield trial
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):  # somebody has begun a run there meanwhile
                path.rmdir()


def _on_nodes(
    function: Callable[..., Any],
    arguments: Mapping[str, tuple[Any, ...]],
    names: Mapping[str, str],
    deadline_s: float,
    meanwhile: Meanwhile,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `function` answers on each node, by the node's name, and why the others did not answer."""
    task: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(function)
    calls = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(number, soft=False)).remote(*given): names[
            number
        ]
        for number, given in arguments.items()
    }
    return _answers(calls, deadline_s, meanwhile)


def _answers(
    calls: Mapping[Any, str], deadline_s: float, meanwhile: Meanwhile
) -> tuple[dict[str, Any], dict[str, str]]:
    answers: dict[str, Any] = {}
    problems: dict[str, str] = {}
    waiting = list(calls)
    give_up = time.monotonic() + deadline_s
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_S)
        for call in ready:
            try:
                answers[calls[call]] = ray.get(call)
            except Exception as error:  # noqa: BLE001 - whatever ends a task on a broken node is the finding
                problems[calls[call]] = _last_line(error)
        meanwhile()
        if waiting and time.monotonic() > give_up:
            for call in waiting:
                problems[calls[call]] = f"it gave no answer within {deadline_s:.0f} s"
                ray.cancel(call, force=True)
            break
    return answers, problems


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return one_line(lines[-1]) if lines else type(error).__name__


def _ask_autoscaler(bundles: Sequence[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(
        bundles=[bundle_of(bundle.all_cpus, bundle.all_gpus) for bundle in bundles],
        bundle_label_selectors=[dict(bundle.labels) for bundle in bundles],
    )


def _sleep(meanwhile: Meanwhile) -> None:
    time.sleep(LOOK_S)
    meanwhile()


def _shown(place: str) -> str:
    return place.partition("?")[0] if is_object_store(place) else place
