"""`amenable plan`: a recipe's resource plan for PPO, calibrated by a run where one is named."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.durations import spoken
from corpus.problems import UsageProblem

if TYPE_CHECKING:
    from amenable.recipe import Recipe
    from cluster.calibration import Calibration
    from cluster.hardware import Hardware
    from cluster.plan import Plan, Shares
    from cluster.ppo_time import Constants, PpoWork
    from models.shape import ModelShape

GPU = "h100-80gb"
CPU = "cpu-core"
"""What is reckoned with where a person names nothing."""

WORLD_WORDS = 190
"""Rows of the embedding in the built-in world: its tokenizer has a token a word (measured: the demo, and tests/
end_to_end/tiny.yaml). A run that there is has its own in config.json."""

CONFIGS = ("round-01/ppo-init/export", "sft/epoch-01", "base/export")
"""Where a run keeps the configuration of its models, relative to its directory."""


@dataclass(frozen=True)
class Planned:
    """A recipe's plan, with all that it was reckoned from."""

    recipe: str
    model: str
    shape: "ModelShape"
    shares: "Shares"
    hardware: tuple["Hardware", ...]
    constants: "Constants"
    plan: "Plan"
    calibration: "Calibration | None"
    calibrated_by: str | None
    stops_after_updates: int | None
    """Where limits.gpu_hours would end PPO before its last update, were nothing else to use any."""


def planned(recipe: "Recipe", run: str | None, hardware: str | None, model: str | None) -> Planned:
    """The plan of `recipe` on `hardware` (a name of the table or a file; None: an H100, or CPU cores where no role has
    a GPU), for the shape of `model` (a preset, a directory or a name on the Hub; None: the recipe's), with the
    constants that the run called `run` measured.

    Raises UsageProblem for what is not there or does not belong together.
    """
    from cluster.calibration import calibrated
    from cluster.hardware import hardware_named
    from cluster.plan import plan
    from cluster.ppo_time import Constants

    shares = _shares(recipe)
    gpus = any(share.gpus > 0 for share in (shares.learners, shares.generators, shares.scorers))
    named = hardware_named(hardware or (GPU if gpus else CPU))
    if named.kind == "cpu" and gpus:
        raise UsageProblem(
            f"--hardware {named.name} is a CPU's core, and the recipe asks for GPUs; name a GPU.", "plan/hardware"
        )
    gpu, cpu = (named, hardware_named(CPU)) if named.kind == "gpu" else (hardware_named(GPU), named)
    shape, says = _shape(recipe, model)
    work = _work(recipe, shape, shares, gpu, cpu)
    constants, calibration = Constants(), None
    if run is not None:
        calibration = _calibration(run, gpu, cpu, calibrated)
        constants = calibration.constants
    made = plan(work, shares, recipe.serving, constants)
    used = {each.name: each for each in (work.machines.learners, work.machines.generators, work.machines.scoring)}
    return Planned(
        recipe=recipe.name,
        model=says,
        shape=shape,
        shares=shares,
        hardware=tuple(used.values()),
        constants=constants,
        plan=made,
        calibration=calibration,
        calibrated_by=run,
        stops_after_updates=_updates_within(recipe, made),
    )


def answer(found: Planned) -> dict[str, Any]:
    """The plan as plain values, for --json."""
    from cluster.plan import FORMULAS

    content = asdict(found)
    content["hardware"] = [each.model_dump(mode="json") for each in found.hardware]
    content["formulas"] = dict(FORMULAS)
    content["plan"]["fits"] = found.plan.fits
    for role, values in zip(found.plan.roles, content["plan"]["roles"], strict=True):
        values["fits"] = role.fits
    return content


def told(found: Planned) -> str:
    """The plan for a person: roles, times, costs, and what all rests on."""
    from cluster.plan import FORMULAS

    made, update = found.plan, found.plan.update
    lines = [f"{found.recipe}: {found.model}, {_count(found.shape.parameters)} parameters", ""]
    lines += _table(
        ["role", "processes", "bundle of each", "device", "needs, GiB", "has, GiB", "GPU-hours", "cost, USD"],
        [
            [
                role.role,
                str(role.processes),
                " + ".join(f"{amount:g} {name}" for name, amount in role.bundle.items()),
                role.hardware,
                _gib(role.memory_total_bytes),
                _gib(role.memory_budget_bytes) + ("" if role.fits else " TOO LITTLE"),
                f"{role.gpu_hours:.3g}",
                f"{role.cost_usd:.3g}",
            ]
            for role in made.roles
        ],
    )
    lines += ["", "Memory of one process, on each of its devices, GiB:"]
    lines += [f"- {role.role}: {_parts(role.memory_bytes)}{_beside(role.node_memory_bytes)}" for role in made.roles]
    stage, ranks = made.lowest_zero_stage_that_fits, made.lowest_tensor_parallel_that_fits
    neither = made.generators_so_that_neither_waits
    replicas = made.serving.replicas
    lines += [
        "",
        "Conductor, episode stream and weight store ask for no CPU, and lie on any node with learners.node_labels.",
        f"ZeRO stage {made.zero_stage}; the lowest that fits: {'none' if stage is None else stage}.",
        f"Tensor parallelism {made.tensor_parallel} of each generator; the lowest that fits: "
        f"{'none' if ranks is None else ranks}.",
        f"Keys and values of an engine hold {made.kv_sequences} sequences of full length.",
        f"Generators {made.generators}; so that neither they nor the learner wait: "
        f"{'none does it' if neither is None else neither}.",
        f"Service: {replicas[0]} to {replicas[1]} replicas of {made.serving.engines} engines, each reckoned at "
        f"{_gib(made.serving.engine_bytes)} GiB (serving.engine_gib {_gib(made.serving.engine_budget_bytes)}).",
        "",
        f"An update: {update.update_s:.3g} s (publish {update.publish_s:.3g}, generate {update.generate_s:.3g}, score "
        f"{update.score_s:.3g}, prepare {update.prepare_s:.3g}, train {update.train_s:.3g}); learner waits "
        f"{update.learner_waits_s:.3g}, generators wait {update.generators_wait_s:.3g}.",
        f"{made.episodes_per_s:.3g} episodes/s; all of PPO {spoken(3600 * made.hours)}, {made.gpu_hours:.3g} GPU-hours "
        f"and {made.cost_usd:.3g} USD. Stages before and after PPO are not in it.",
    ]
    if found.stops_after_updates is not None:
        lines.append(f"limits.gpu_hours would end PPO after {found.stops_after_updates} updates.")
    lines += ["", *(f"- {remark}" for remark in made.remarks), "", "Formulas:"]
    lines += [f"- {name}: {text}" for name, text in FORMULAS]
    lines += ["", "Assumptions" + (":" if found.calibration is None else ", measured ones marked:")]
    lines += [f"- {line}" for line in _assumptions(found)]
    if found.calibration is not None:
        lines += ["", *_calibration_told(found.calibration, found.calibrated_by)]
    return "\n".join(lines)


def _shares(recipe: "Recipe") -> "Shares":
    from cluster.plan import Share, shares_of

    learners, rollouts = recipe.learners, recipe.rollouts
    return shares_of(
        Share(learners.workers, learners.threads, learners.gpus),
        Share(rollouts.generators, rollouts.threads, rollouts.gpus, rollouts.tensor_parallel),
        recipe.scoring,
    )


def _work(recipe: "Recipe", shape: "ModelShape", shares: "Shares", gpu: "Hardware", cpu: "Hardware") -> "PpoWork":
    from cluster.plan import work_machines
    from cluster.ppo_time import Learners, PpoWork

    return PpoWork(
        machines=work_machines(shares, gpu, cpu),
        shape=shape,
        ppo=recipe.ppo,
        sampling=recipe.sampling,
        max_prompt_tokens=recipe.tokens.max_prompt_tokens,
        learners=Learners(shares.learners.processes, shares.learners.computing, recipe.learners.engine),
        rollouts=recipe.rollouts,
        generator_devices=shares.generators.computing,
        scoring=recipe.scoring,
        scoring_devices=shares.scorers.computing,
    )


def _shape(recipe: "Recipe", model: str | None) -> tuple["ModelShape", str]:
    """The shape that is planned for, and what it is called."""
    from cluster.model_presets import model_presets
    from models.shape import llama_shape, shape_of_model

    if model is not None:
        presets = model_presets()
        return (presets[model], f"preset {model}") if model in presets else (shape_of_model(model), model)
    base = recipe.model.base
    if base is not None:
        return shape_of_model(base), base
    rows = WORLD_WORDS if recipe.synthetic else recipe.model.vocab_size
    return llama_shape(recipe.model.shape, rows), "the recipe's small model"


def _calibration(run: str, gpu: "Hardware", cpu: "Hardware", calibrated: Any) -> "Calibration":
    """What the run measured. It is taken to have run on the devices that are planned with."""
    from amenable.recipe import Recipe
    from amenable.recipe_loading import load_recipe
    from amenable.run_directory import RunDirectory
    from cluster.ppo_time import Constants
    from learners.metrics import read_metrics

    with RunDirectory.find(run).for_reading() as directory:
        lines = read_metrics(directory.round(1).ppo / "metrics.jsonl")
        if not lines:
            raise UsageProblem(
                f"{run} has no metrics of PPO yet; name a run that has trained some updates.", "run/not-so-far"
            )
        recipe = load_recipe(directory.recipe, [], Recipe)
        work = _work(recipe, _shape_of_run(recipe, directory.root), _shares(recipe), gpu, cpu)
        return calibrated(work, lines, Constants())


def _shape_of_run(recipe: "Recipe", root: Path) -> "ModelShape":
    from models.shape import shape_of_model

    for place in CONFIGS:
        if (root / place / "config.json").is_file():
            return shape_of_model(str(root / place))
    return _shape(recipe, None)[0]


def _updates_within(recipe: "Recipe", made: "Plan") -> int | None:
    limit = recipe.limits.gpu_hours
    if limit is None or made.gpu_hours <= limit:
        return None
    return int(recipe.ppo.updates * limit / made.gpu_hours)


def _assumptions(found: Planned) -> list[str]:
    said = [
        f"{each.name}: {each.says}; {each.memory_gib:g} GiB, {each.bf16_tflops:g} TFLOP/s in bfloat16 and "
        f"{each.fp32_tflops:g} in float32, {each.bandwidth_gb_per_s:g} GB/s ({each.source}); "
        f"{each.price_usd_per_hour:g} USD an hour (assumed; --hardware FILE has yours)"
        for each in found.hardware
    ]
    from cluster.ppo_time import Constants

    assumed = Constants()
    for name, value in asdict(found.constants).items():
        is_measured = value != getattr(assumed, name)
        said.append(f"{name.replace('_', ' ')} {value:.3g}" + (" (measured)" if is_measured else ""))
    return said


def _calibration_told(calibration: "Calibration", run: str | None) -> list[str]:
    measured = calibration.measured
    return [
        f"Calibrated by {run}, {measured.updates} updates, taken to have run on the same devices.",
        f"Its update took {measured.update_s:.3g} s (median). A plan of it with the assumptions is off by "
        f"{calibration.error_before:+.0%}, with its own constants by {calibration.error_after:+.0%}.",
    ]


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    ]


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(amount)}" for name, amount in parts.items() if amount >= 0.005 * (1 << 30))


def _beside(node_bytes: int) -> str:
    return f"; beside it in the node's memory {_gib(node_bytes)}" if node_bytes else ""


def _gib(amount: float) -> str:
    return f"{amount / (1 << 30):.3g}"


def _count(parameters: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:,}"
