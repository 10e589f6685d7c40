"""What can be known to be wrong before any long work, told before anything is started or written."""

import importlib.util
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from amenable.recipe import Recipe
from amenable.stages import data
from cluster.address import Place, cluster_place
from cluster.secrecy import FOR_A_RUN, check_no_secret, check_variable
from corpus.problems import UsageProblem
from models.shape import ModelShape, llama_shape, shape_of_model

_PORTS = {"http": 80, "https": 443}


def check_alone(recipe: Recipe) -> None:
    """Raises UsageProblem for what a recipe says that cannot be, wherever it runs and whatever is there."""
    _check_lengths(recipe)
    _check_transport(recipe)
    if recipe.model.base is None:
        _check_division(recipe, "The small model of model.shape", llama_shape(recipe.model.shape, 1))
    check_no_secret(recipe.model_dump(mode="json"), os.environ, "recipe", FOR_A_RUN)


def check_early(recipe: Recipe, address: str | None = None) -> None:
    """Raises UsageProblem for a base model, corpus, reward or cluster address that is not there or cannot serve, for
    stages whose sequences are too short for their data, and for GPUs and node labels that a local session (no
    `address`) cannot have."""
    if address is not None:
        cluster_place(address)
    check_alone(recipe)
    _check_corpus(recipe)
    if address is None:
        _check_gpus(recipe)
        _check_labels(recipe)
    if recipe.model.base is not None:
        from models.build import check_causal_lm

        tuned = (recipe.sft.context_length, recipe.ppo_init.context_length)
        check_causal_lm(recipe.model.base, max(recipe.tokens.context_tokens, *tuned))
        if recipe.rollouts.tensor_parallel > 1:
            _check_division(recipe, f"Model {recipe.model.base!r}", shape_of_model(recipe.model.base))
    from actors.rewards import check_reward

    check_reward(recipe.reward, has_environment=address is None)
    if address is None and recipe.reward.url is not None:
        _check_service(recipe.reward.url)


def check_variables(variables: Sequence[str]) -> None:
    """Raises UsageProblem for what names no environment variable, and for one that this process does not have."""
    missing = [name for name in map(check_variable, variables) if not os.environ.get(name)]
    if missing:
        raise UsageProblem(
            f"The environment has no {' and no '.join(missing)}, which --env asks for; set it for this command, or for "
            "the Ray processes of the cluster's nodes where this is a job.",
            "cluster/variable",
        )


def check_source(address: str) -> None:
    """Raises UsageProblem where there is nothing at `address` that rows could be read from; a dataset of the Hub is
    only asked for what reads it."""
    from corpus.hub import HUB
    from corpus.readers import find_files

    if not address.startswith(HUB):
        find_files(address)
    elif importlib.util.find_spec("datasets") is None:
        raise UsageProblem(
            f"{address}: reading from the Hub needs the `datasets` package (pip install 'amenable[hub]').",
            "data/hub-package",
        )


def _check_lengths(recipe: Recipe) -> None:
    longest = recipe.tokens.max_prompt_tokens + recipe.tokens.max_response_tokens
    tuned = {"sft": recipe.sft, "ppo_init": recipe.ppo_init}
    for name, stage in tuned.items():
        if stage.context_length < longest:
            raise UsageProblem(
                f"{name}.context_length {stage.context_length} is less than tokens.max_prompt_tokens + "
                f"tokens.max_response_tokens, {longest}: demonstrations of that length could not be trained on.",
                "recipe/lengths",
            )
    if recipe.model.base is None:
        own = recipe.model.shape.context_length
        for name, stage in {"base": recipe.base, **tuned}.items():
            if stage.context_length > own:
                raise UsageProblem(
                    f"{name}.context_length {stage.context_length} is more than model.shape.context_length {own}: the "
                    "small model reads no longer sequences; lower the one or raise the other.",
                    "recipe/lengths",
                )


def _check_corpus(recipe: Recipe) -> None:
    corpus = recipe.corpus
    if corpus is None:
        return
    if corpus.path is None:
        for name in ("pretraining", "demonstrations", "prompts", "comparisons"):
            if getattr(corpus, name) is None:
                raise UsageProblem(
                    f"The corpus has no source for its {name}: give corpus.path or corpus.{name}.", "data/no-source"
                )
    for address in data.addresses(recipe):
        check_source(address)


def _check_transport(recipe: Recipe) -> None:
    if recipe.rollouts.transport != "ipc":
        return
    learners, rollouts = recipe.learners, recipe.rollouts
    if learners.workers != 1 or not 0 < learners.gpus < 1 or not 0 < rollouts.gpus < 1:
        raise UsageProblem(
            f"rollouts.transport ipc is for one learner rank that shares a GPU with the generators, and the recipe has "
            f"learners.workers {learners.workers}, learners.gpus {learners.gpus:g} and rollouts.gpus "
            f"{rollouts.gpus:g}; give 1 and fractions of a GPU, or use object_store.",
            "recipe/transport",
        )


def _check_division(recipe: Recipe, model: str, shape: ModelShape) -> None:
    ranks = recipe.rollouts.tensor_parallel
    why = shape.undivided(ranks)
    if why:
        fewer = max(each for each in range(1, ranks) if not shape.undivided(each))
        raise UsageProblem(
            f"{model} cannot be divided over rollouts.tensor_parallel {ranks} devices: {why}; {fewer} would do.",
            "recipe/division",
        )


def _check_gpus(recipe: Recipe) -> None:
    asked = {
        "learners.gpus": recipe.learners.gpus,
        "rollouts.gpus": recipe.rollouts.gpus,
        "scoring.gpus": recipe.scoring.gpus,
    }
    wanted = {key: gpus for key, gpus in asked.items() if gpus > 0}
    if wanted and not _has_gpu():
        keys = ", ".join(f"{key} {gpus:g}" for key, gpus in wanted.items())
        raise UsageProblem(
            f"The recipe asks for GPUs ({keys}), and this machine has none that Ray could use; set these keys to 0, or "
            "give a cluster that has some with --address.",
            "devices/none",
        )


def _check_labels(recipe: Recipe) -> None:
    asked = {
        "learners.node_labels": recipe.learners.node_labels,
        "rollouts.node_labels": recipe.rollouts.node_labels,
        "scoring.node_labels": recipe.scoring.node_labels,
    }
    for key, labels in asked.items():
        if labels:
            told = ", ".join(f"{name}={value}" for name, value in labels.items())
            raise UsageProblem(
                f"{key} asks for nodes with {told}, and a session of this machine has no labels; leave them out, or "
                "give a cluster that has such nodes with --address.",
                "placement/labels",
            )


def _has_gpu() -> bool:
    """Whether there is a GPU that this process may use: NVIDIA's, AMD's, or that of Windows under WSL."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return False
    devices = Path("/dev")
    return any(devices.glob("nvidia[0-9]*")) or any((devices / name).exists() for name in ("kfd", "dxg"))


def _check_service(url: str) -> None:
    """Raises UsageProblem where the host of the reward service is not known, or refuses a connection. One that is
    merely slow, or stands behind a proxy, is left to the run."""
    if urllib.request.getproxies():
        return
    parts = urlsplit(url)
    place = Place(parts.hostname or "", parts.port or _PORTS[parts.scheme])
    refusal = place.refusal()
    if refusal is not None and not isinstance(refusal, TimeoutError):
        raise UsageProblem(
            f"reward service {url}: nobody answers at {place.host}:{place.port} ({refusal}); start the service, or "
            "correct reward.url.",
            "reward/unreachable",
        )
