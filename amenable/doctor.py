"""`amenable doctor`: whether a run can start, here or on a cluster; the same is asked at the start of every job."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from actors.settings import NodeLabels
from amenable import interruption
from amenable.early_checks import check_early
from amenable.plan import planned
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from amenable.run_directory import RunDirectory
from cluster.checks import Finding, Need, check_answers, check_memory, failed
from cluster.node_facts import MODULES, Device, NodeFacts
from cluster.packing import Bundle, Labels, Room, pack, places_of_processes
from cluster.room import check_room, spoken
from cluster.secrecy import check_variable
from cluster.supported import STACK, supported
from cluster.under_job import address_here, check_run_directory
from corpus.problems import RunProblem

HERE = "this machine"

ROLES = {
    "learners": "learner",
    "generators": "generator",
    "reward and reference": "scoring",
    "reward": "reward",
    "reference": "reference",
}
"""What a process of the plan's roles is called here."""

FACTS_DEADLINE_S = 300.0
"""Seconds for this machine to import the stack. House default, as for a node of a cluster."""

_GATHER = (
    "import json, sys; from dataclasses import asdict; from cluster.node_facts import gather; "
    "facts = gather(*json.load(sys.stdin)); json.dump(asdict(facts), open(sys.argv[1], 'w'))"
)


def bundles_of(recipe: Recipe) -> list[Bundle]:
    """What the processes of a run reserve while PPO trains, when all roles are there: one bundle a process, but for
    learners that must be on one node. Learners are those of Ray Train's placement group; its controller and the run's
    other actors reserve nothing."""
    learners, rollouts, scoring = recipe.learners, recipe.rollouts, recipe.scoring
    hosts = ("scoring",) * scoring.scorers
    if not scoring.fused:
        hosts = ("reward",) * scoring.scorers + ("reference",) * scoring.references
    together = learners.workers if learners.placement == "strict_pack" else 1
    return [
        *[Bundle("learner", learners.threads, learners.gpus, together, _labels(learners.node_labels))]
        * (learners.workers // together),
        *[Bundle("generator", rollouts.threads, rollouts.gpus, labels=_labels(rollouts.node_labels))]
        * rollouts.generators,
        *(Bundle(role, scoring.threads, scoring.gpus, labels=_labels(scoring.node_labels)) for role in hosts),
    ]


def _labels(node_labels: NodeLabels) -> Labels:
    return frozenset(node_labels.items())


def needs_of(recipe: Recipe) -> list[Need]:
    """What each process of `bundles_of` is reckoned to take while PPO trains, in their order: the plan's estimate."""
    roles = {ROLES[role.role]: role for role in planned(recipe, None, None, None).plan.roles}
    return [
        Need(
            bundle.role,
            roles[bundle.role].memory_total_bytes,
            roles[bundle.role].node_memory_bytes,
            bundle.gpus,
        )
        for bundle in bundles_of(recipe)
        for _ in range(bundle.processes)
    ]


def examined(
    recipe: str | None,
    overrides: list[str],
    run: str | None,
    address: str | None,
    variables: Sequence[str],
    progress: Progress,
) -> list[Finding]:
    """What `amenable doctor` finds: about the cluster at `address`, under a Ray job about its own, else about this
    machine. Raises UsageProblem for a recipe, address or variable that cannot be."""
    where = [f"run_directory={json.dumps(run, ensure_ascii=False)}"] if run is not None else []
    settings = None if recipe is None else load_recipe(recipe, [*overrides, *where], Recipe)
    for name in variables:
        check_variable(name)
    address = address_here(address)
    if settings is not None:
        check_run_directory(settings.run_directory)
        check_early(settings, address)
    if address is None:
        return examine_here(settings, variables, progress)
    from cluster.session import session

    with session(address, cpus=1, meanwhile=_stop):
        return examine_cluster(settings, variables, progress)


def examine_here(recipe: Recipe | None, variables: Sequence[str], progress: Progress) -> list[Finding]:
    """The findings about this machine, as a local session would use it."""
    from cluster.doctor import findings_of, try_here

    variables = _needed(recipe, variables)
    with progress.waiting("this machine to import what a run needs"):
        facts, problem = _facts_here(variables)
    findings = [check_answers([HERE], {HERE: problem} if problem else {})]
    if facts is not None:
        gpus = float(facts.usable_gpus)
        findings += findings_of({HERE: facts}, supported(), {HERE: gpus}, variables)
        if recipe is not None:
            # A local session offers the CPUs that the roles ask for, and they take turns on the cores there are.
            bundles = bundles_of(recipe)
            cpus = sum(bundle.all_cpus for bundle in bundles)
            room = Room(HERE, cpus, gpus, cpus, gpus)  # without labels, as a local session
            findings.append(check_room(bundles, [room], None))
            findings.append(
                check_memory(needs_of(recipe), places_of_processes(bundles, pack(bundles, [room])), {HERE: facts})
            )
    if recipe is not None:
        findings += [try_here(place) for place in _places(RunDirectory(recipe.run_directory))]
    return findings


def examine_cluster(recipe: Recipe | None, variables: Sequence[str], progress: Progress) -> list[Finding]:
    """The findings about the cluster whose session this process has: its nodes, and for a recipe its storage and the
    room for its roles as it is now. Raises Interrupted where a stop is asked for."""
    from cluster.doctor import capacity, examine_nodes, examine_storage

    variables = _needed(recipe, variables)
    found = capacity(_stop)
    with progress.waiting("every node to import what a run needs"):
        findings, facts = examine_nodes(found, supported(), variables, _stop)
    if recipe is None:
        return findings
    with progress.waiting("every node to try the storage"):
        findings += [examine_storage(found, place, _stop) for place in _places(RunDirectory(recipe.run_directory))]
    bundles, rooms = bundles_of(recipe), list(found.rooms.values())
    findings.append(check_memory(needs_of(recipe), places_of_processes(bundles, pack(bundles, rooms)), facts))
    return [*findings, check_room(bundles, rooms, found.groups)]


def check_before_start(recipe: Recipe, variables: Sequence[str], progress: Progress) -> None:
    """At the start of a job, before anything is reserved: waits for room, and raises RunProblem, which says all that is
    wrong, where the run cannot start."""
    from cluster.doctor import await_room

    findings = [each for each in examine_cluster(recipe, variables, progress) if each.check != "placement"]
    wrong = failed(findings)
    if not wrong:
        bundles = bundles_of(recipe)
        with progress.waiting(f"room for {spoken(bundles)}"):
            wrong = failed([await_room(bundles, progress.note, _stop)])
    if wrong:
        told = " ".join(f"{each.check}: {each.says}." for each in wrong)
        sentence = f"The cluster cannot run this recipe. {told} (amenable doctor asks the same.)"
        if any(each.for_good for each in wrong):
            raise RunProblem(sentence, "cluster/too-small")
        raise RunProblem(sentence, "cluster/not-fit")


def _needed(recipe: Recipe | None, variables: Sequence[str]) -> list[str]:
    """The environment variables that must be there: `variables`, and the one that holds the recipe's bearer token."""
    token = None if recipe is None else recipe.reward.token_variable
    return list(dict.fromkeys([*variables, *([token] if token is not None else [])]))


def told(findings: Sequence[Finding]) -> str:
    """The findings for a person, a line each."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join(f"{finding.state:7}  {finding.check:{width}}  {finding.says}" for finding in findings)


def _places(run: RunDirectory) -> list[str]:
    """The places where processes of a run write: its directory, or its address and its working copy."""
    return [str(run.root)] if run.stored is None else [run.stored.address, str(run.root)]


def _facts_here(variables: Sequence[str]) -> tuple[NodeFacts | None, str]:
    """This machine's facts, from a process of their own: imports take room, and a broken package may end it."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        try:
            ended = subprocess.run(
                [sys.executable, "-c", _GATHER, answer.name],
                input=json.dumps([STACK, MODULES, list(variables)]),
                capture_output=True,
                text=True,
                timeout=FACTS_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, f"it did not import the stack within {FACTS_DEADLINE_S:.0f} s"
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines()
            return None, f"looking at it ended with {ended.returncode} ({lines[-1] if lines else 'no reason given'})"
        found: dict[str, Any] = json.load(answer)
    found["devices"] = tuple(Device(**each) for each in found["devices"])
    found["missing_variables"] = tuple(found["missing_variables"])
    return NodeFacts(**found), ""


def _stop() -> None:
    interruption.stop_if_requested("the examination of the cluster")


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` tells."""
    return {"passed": not failed(findings), "findings": [asdict(finding) for finding in findings]}
