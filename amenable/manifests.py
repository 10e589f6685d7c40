"""`amenable manifests`: a recipe's Kubernetes manifests for KubeRay, made from its plan."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from amenable.durations import spoken
from amenable.recipe_loading import recipe_hash, resolved
from cluster.secrecy import FOR_A_RUN, check_no_secret
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, is_object_store

if TYPE_CHECKING:
    from amenable.plan import Planned
    from amenable.recipe import Recipe
    from cluster.manifests import Part

LEAST_DEADLINE_S = 24 * 3600
DEADLINE_OVER_PLAN = 4
"""The job is ended after so many times the hours that the plan gives PPO: the other stages, retries and what a plan
does not know. House default."""

SLICES = {"learners": "learners", "generators": "rollouts", "scoring": "scoring"}
"""The slice of a recipe that each worker group's role reads."""

RAYS_OWN = "ray.io/"
"""How the labels begin that Ray gives nodes itself."""

OWN_LABELS = frozenset({"amenable-run", "amenable-client"})
"""Labels of pods by which the network policies of a run select them."""


@dataclass(frozen=True)
class Rendered:
    """Manifests as YAML, and what a person should know before they are applied, a sentence each."""

    text: str
    remarks: tuple[str, ...]


def rendered(
    recipe: "Recipe",
    image: str | None,
    storage: str,
    claim: str,
    parts: tuple["Part", ...],
    queue: str | None,
    spot: bool,
    hardware: str | None,
    model: str | None,
    monitoring: bool,
    measured: str | None,
) -> Rendered:
    """The manifests of `recipe` as one YAML of several documents.

    `image` is every pod's; None is what the Dockerfile's examples make. `storage` is where the run's directory is made:
    a path below /shared, where the PersistentVolumeClaim `claim` is mounted, or an address in an object store. With
    `monitoring` there are alerts and a dashboard too. The run called `measured` calibrates the plan, and pods are given
    the time of its longest checkpoint before they end. Raises
    UsageProblem where the recipe names files that pods cannot see, or the arguments do not fit; RunProblem where what
    was made breaks a rule, which is a fault of this program.
    """
    import yaml

    from actors.rewards import check_reward
    from amenable.plan import planned
    from cluster.manifest_rules import problems
    from cluster.manifests import SHARED, RunManifests, render
    from cluster.worker_groups import serving_group, worker_groups

    told = {"recipe": recipe.model_dump(mode="json"), "storage": storage}
    check_no_secret(told, os.environ, "manifests", FOR_A_RUN)
    stored = is_object_store(storage)
    if not stored and not f"{storage}/".startswith(f"{SHARED}/"):
        raise UsageProblem(
            f"--storage {storage} should be below {SHARED}, where pods mount the volume, or an address in an object "
            "store.",
            "manifests/place",
        )
    _check_places(recipe)
    if recipe.reward.url is not None:
        check_reward(recipe.reward, has_environment=False)
    recipe = _bound(recipe)
    found = planned(recipe, measured, hardware, model)
    shares = found.shares
    nodes = found.hardware[0].devices_per_node
    deadline_s = max(LEAST_DEADLINE_S, round(DEADLINE_OVER_PLAN * 3600 * found.plan.hours))
    asked = RunManifests(
        run=recipe.name,
        recipe=resolved(recipe),
        recipe_hash=recipe_hash(recipe)[:16],
        image=image or f"amenable:{version('amenable')}-{'cuda' if recipe.gpus else 'cpu'}",
        run_directory=below(storage if stored else storage.rstrip("/"), recipe.name),
        claim=claim,
        groups=[
            replace(group, labels=_labels_given(getattr(recipe, SLICES[group.name]).node_labels))
            for group in worker_groups(found.plan, shares, nodes, recipe.fleet.max_generators)
        ],
        serving=serving_group(found.plan, recipe.serving, shares.scorers),
        replicas=(recipe.serving.min_replicas, recipe.serving.max_replicas),
        concurrent_requests=recipe.serving.limits.concurrent,
        checkpoint_s=max(recipe.learners.stop_grace_s, _checkpoint_s(found) or 0.0),
        deadline_s=deadline_s,
        queue=queue,
        spot=spot,
        monitoring=monitoring,
        addresses=_addresses(recipe),
        secret_variables=_secret_variables(recipe),
    )
    wrong = problems(render(asked))  # of all parts: some rules are about what another part has
    if wrong:
        raise RunProblem(f"The manifests that were made would be refused: {'; '.join(wrong)}.", "manifests/invalid")

    class Dumper(yaml.SafeDumper):
        """Writes text of several lines as such, so that a recipe in a ConfigMap can be read."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, block)
    text = yaml.dump_all(render(asked, parts), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return Rendered(text, tuple(_remarks(found, recipe.learners.stop_grace_s, deadline_s)) if "train" in parts else ())


def _bound(recipe: "Recipe") -> "Recipe":
    """The recipe with each role on the pods of its own worker group, where it names no labels itself. Raises
    UsageProblem where it names one by which network policies tell pods apart: KubeRay makes Ray's labels theirs."""
    from cluster.manifests import ROLE_LABEL

    for slice_ in SLICES.values():
        own = sorted(OWN_LABELS & set(getattr(recipe, slice_).node_labels))
        if own:
            raise UsageProblem(
                f"{slice_}.node_labels names {own[0]}, by which the run's network policies know its pods: give it "
                "another name.",
                "manifests/label",
            )

    bound = {
        slice_: getattr(recipe, slice_).model_copy(update={"node_labels": {ROLE_LABEL: group}})
        for group, slice_ in SLICES.items()
        if not getattr(recipe, slice_).node_labels
    }
    return recipe.model_copy(update=bound)


def _labels_given(asked: Mapping[str, str]) -> dict[str, str]:
    """The labels that a worker group is to give its pods, so that a role which asks for `asked` is placed there."""
    return {key: value for key, value in asked.items() if not key.startswith(RAYS_OWN)}


def _checkpoint_s(found: "Planned") -> float | None:
    """Seconds of the longest checkpoint of the run that calibrated the plan."""
    return None if found.calibration is None else found.calibration.measured.checkpoint_s


def _remarks(found: "Planned", stop_grace_s: float, deadline_s: int) -> Iterator[str]:
    """What the plan is not sure of, and the training rests on."""
    for role in (role for role in found.plan.roles if not role.fits and "GPU" in role.bundle):
        yield (
            f"{role.role} is reckoned to need {_gib(role.memory_total_bytes)} of the {_gib(role.memory_budget_bytes)} "
            f"GiB that it has of {role.hardware}, so that the doctor will not let the run start; `amenable plan` says "
            "what would fit, --hardware names another device."
        )
    yield (
        f"The job is ended after {spoken(deadline_s)} (activeDeadlineSeconds {deadline_s}): {DEADLINE_OVER_PLAN} times "
        f"what the plan gives PPO on {', '.join(each.name for each in found.hardware)}, a day at least. Raise it where "
        "other stages or slower devices take longer."
    )
    checkpoint_s = _checkpoint_s(found)
    if checkpoint_s is None:
        yield (
            f"Pods that are taken away are given {stop_grace_s:g} s for a checkpoint (learners.stop_grace_s); --from "
            "RUN takes the time that one was measured to take."
        )
    elif checkpoint_s > stop_grace_s:
        yield (
            f"A checkpoint of {found.calibrated_by} took {checkpoint_s:.0f} s, and learners.stop_grace_s is "
            f"{stop_grace_s:g}: pods are given the longer time, but a run that is asked to stop is not; raise it."
        )


def _gib(amount: float) -> str:
    return f"{amount / (1 << 30):.3g}"


def parts_of(text: str) -> tuple["Part", ...]:
    """The parts in "common,train". Raises UsageProblem for all else."""
    from cluster.manifests import PARTS

    given = [part.strip() for part in text.split(",")]
    if not set(given) <= set(PARTS):
        raise UsageProblem(
            f"--parts {text!r} should be some of {', '.join(PARTS)}, with commas between.", "manifests/parts"
        )
    return tuple(part for part in PARTS if part in given)


def _check_places(recipe: "Recipe") -> None:
    """Raises UsageProblem for a path of the recipe that only this machine knows."""
    from amenable.stages.data import addresses
    from corpus.hub import HUB

    places = [("a source of the corpus", each) for each in addresses(recipe) if not each.startswith(HUB)]
    if _looks_local(recipe.model.base):
        places.append(("model.base", str(recipe.model.base)))
    if _looks_local(recipe.reward.model):
        places.append(("reward.model", str(recipe.reward.model)))
    for key, place in places:
        if "://" not in place and not os.path.isabs(place):
            raise UsageProblem(
                f"{place} ({key}) is relative to this machine's directory, which pods do not have; give an absolute "
                "path on the volume that they mount at /shared, or an address.",
                "manifests/place",
            )


def _addresses(recipe: "Recipe") -> list[str]:
    """What the training reads or asks in the network, but for the Hub."""
    from amenable.stages.data import addresses

    asked = [recipe.reward.url] if recipe.reward.url is not None else []
    return [*asked, *filter(is_object_store, addresses(recipe))]


def _secret_variables(recipe: "Recipe") -> list[str]:
    """The environment variables that the recipe cannot do without, whose values are secret."""
    from learners.tracking import KEY

    wandb = recipe.tracking.wandb
    token = recipe.reward.token_variable
    return [*([token] if token is not None else []), *([KEY] if wandb is not None and wandb.mode == "online" else [])]


def _looks_local(base: str | None) -> bool:
    """A directory here, as `models.build` would take it; a name of the Hub is none."""
    return base is not None and (base.startswith((".", "~", os.sep)) or base.count("/") > 1 or Path(base).is_dir())
