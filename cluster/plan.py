"""A resource plan for PPO: roles, bundles, memory, who waits for whom, and what it costs. Pure arithmetic.

What it knows of this program: a learner rank uses one GPU, and a generator as many as its tensor parallelism says,
whatever more they are given. Learners shard by ZeRO alone, scoring processes do not at all.
"""

from dataclasses import dataclass

from actors.settings import ScoringSettings
from cluster.hardware import Hardware
from cluster.memory import (
    GIB,
    Device,
    RoleMemory,
    generator_memory,
    learner_memory,
    scoring_memory,
    sequences_that_fit,
    serving_memory,
)
from cluster.ppo_time import Constants, Machines, PpoWork, UpdateTime, update_time
from learners.engine_settings import EngineSettings
from serving.settings import ServingSettings

FORMULAS = (
    ("a forward pass", "2 · weights in matrix products + 2 · layers · attention width · length, FLOP a token"),
    ("training", "3 forward passes (4 with activation checkpointing) of policy, value network and pretraining text"),
    ("preparing", "1 forward pass of the value network, and of the policy on what is compared or recomputed"),
    (
        "an engine step",
        "the longer of reading weights, keys and values, and multiplying, on all its devices; with tensor parallelism "
        "two sums over them a layer; plus its overhead",
    ),
    ("generation", "prompts read once + engine steps · seconds of one; steps as many as the longest response has"),
    ("scoring", "1 forward pass each of reward model and reference"),
    ("publication", "weights in float32 and three times in the engines' dtype over the link, plus its overhead"),
    ("an update at staleness 0", "publish + generate + score the last chunk + prepare + train: all take turns"),
    ("an update at staleness 1 and more", "the slowest of learner (publish + prepare + train), generators, scoring"),
)


@dataclass(frozen=True)
class Share:
    """What a role is given: CPUs and GPUs of each of its processes, and the GPUs that one computes on at most."""

    processes: int
    cpus: int
    gpus: float
    ranks: int = 1

    @property
    def devices(self) -> float:
        """Devices of one process: its GPUs, or, where it has none, its CPUs."""
        return self.gpus or float(self.cpus)

    @property
    def computing(self) -> float:
        """Devices that one process computes on."""
        return min(self.gpus, float(self.ranks)) or float(self.cpus)

    @property
    def system_processes(self) -> int:
        """Processes of the operating system that one is: a divided engine has one a device beside that which
        schedules."""
        return 1 if self.ranks == 1 else self.ranks + 1

    @property
    def device(self) -> Device:
        """What a process computes on."""
        return "gpu" if self.gpus > 0 else "cpu"

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one process as Ray's bundle."""
        return {"CPU": float(self.cpus), **({"GPU": self.gpus} if self.gpus > 0 else {})}


@dataclass(frozen=True)
class Shares:
    """What every role of a recipe is given."""

    learners: Share
    generators: Share
    scorers: Share
    references: Share | None
    """None where the scorers host the reference too."""


@dataclass(frozen=True)
class RolePlan:
    """One role: how many processes of it, what each has and needs, and what all cost over PPO."""

    role: str
    processes: int
    bundle: dict[str, float]
    hardware: str
    memory_bytes: dict[str, int]
    memory_total_bytes: int
    memory_budget_bytes: int
    node_memory_bytes: int
    device_hours: float
    gpu_hours: float
    cost_usd: float

    @property
    def fits(self) -> bool:
        """Whether a process finds the memory that it is reckoned to need."""
        return self.memory_total_bytes <= self.memory_budget_bytes


@dataclass(frozen=True)
class ServingPlan:
    """A replica of the service: engines, and what one is reckoned to need."""

    engines: int
    engine_bytes: int
    engine_budget_bytes: int
    replicas: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What a PPO stage takes."""

    roles: tuple[RolePlan, ...]
    zero_stage: int
    lowest_zero_stage_that_fits: int | None
    tensor_parallel: int
    """Devices that each generator's model is divided over."""
    lowest_tensor_parallel_that_fits: int | None
    """Within one node; None where no number does."""
    kv_sequences: int
    """Sequences of full length whose keys and values one engine holds."""
    generators: int
    generators_so_that_neither_waits: int | None
    update: UpdateTime
    episodes_per_s: float
    hours: float
    gpu_hours: float
    cost_usd: float
    serving: ServingPlan
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every role does."""
        return all(role.fits for role in self.roles)


@dataclass(frozen=True)
class Lowest:
    """The least sharding with which learners and generators find the memory they need; None where none is enough."""

    zero_stage: int | None
    ranks: int | None


def plan(work: PpoWork, shares: Shares, serving: ServingSettings, constants: Constants) -> Plan:
    """The plan of all of a recipe's PPO updates."""
    update = update_time(work, constants)
    hours = work.ppo.updates * update.update_s / 3600
    roles = tuple(_roles(work, shares, hours))
    longest = work.max_prompt_tokens + work.sampling.max_response_tokens
    ranks = work.rollouts.tensor_parallel
    kv_sequences = sequences_that_fit(work.shape, work.rollouts.kv_cache_mib, work.rollouts.dtype, longest, ranks)
    lowest = Lowest(_lowest_stage(work, shares.learners), _lowest_ranks(work, shares.generators))
    needed = generators_so_that_neither_waits(work, constants)
    return Plan(
        roles=roles,
        zero_stage=work.learners.engine.zero_stage,
        lowest_zero_stage_that_fits=lowest.zero_stage,
        tensor_parallel=ranks,
        lowest_tensor_parallel_that_fits=lowest.ranks,
        kv_sequences=kv_sequences,
        generators=work.rollouts.generators,
        generators_so_that_neither_waits=needed,
        update=update,
        episodes_per_s=update.episodes_per_s(work.ppo.batch_size),
        hours=hours,
        gpu_hours=sum(role.gpu_hours for role in roles),
        cost_usd=sum(role.cost_usd for role in roles),
        serving=_serving(work, serving, longest),
        remarks=tuple(_remarks(work, shares, roles, lowest, needed, kv_sequences, update)),
    )


def generators_so_that_neither_waits(work: PpoWork, constants: Constants) -> int | None:
    """The fewest generators that write a batch in the time in which the learner trains one; None where a generator for
    each chunk of a batch would still be too few. At staleness 0 the two take turns whatever their number."""
    for generators in range(1, work.ppo.batch_size // work.ppo.chunk_size + 1):
        update = update_time(work.with_generators(generators), constants)
        if update.generate_steady_s <= update.publish_s + update.prepare_s + update.train_s:
            return generators
    return None


def _roles(work: PpoWork, shares: Shares, hours: float) -> list[RolePlan]:
    longest = work.max_prompt_tokens + work.sampling.max_response_tokens
    learners, generators = shares.learners, shares.generators
    memory = learner_memory(work.shape, learners.processes, work.learners.engine, learners.device)
    found = [_role("learners", learners, work.machines.learners, memory, hours)]
    memory = generator_memory(work.shape, work.rollouts, longest, generators.device)
    found.append(_role("generators", generators, work.machines.generators, memory, hours))
    for name, share, hosts in _scoring_roles(shares):
        memory = scoring_memory(
            work.shape,
            work.scoring,
            work.max_prompt_tokens,
            work.sampling.max_response_tokens,
            share.device,
            hosts,
        )
        found.append(_role(name, share, work.machines.scoring, memory, hours))
    return found


def _scoring_roles(shares: Shares) -> list[tuple[str, Share, frozenset]]:
    if shares.references is None:
        return [("reward and reference", shares.scorers, frozenset(("reward", "reference")))]
    return [
        ("reward", shares.scorers, frozenset(("reward",))),
        ("reference", shares.references, frozenset(("reference",))),
    ]


def _role(name: str, share: Share, hardware: Hardware, memory: RoleMemory, hours: float) -> RolePlan:
    devices = share.processes * share.devices
    return RolePlan(
        role=name,
        processes=share.processes,
        bundle=share.bundle,
        hardware=hardware.name,
        memory_bytes=dict(memory.parts),
        memory_total_bytes=memory.total_bytes,
        memory_budget_bytes=_budget(share, hardware),
        node_memory_bytes=memory.node_bytes,
        device_hours=devices * hours,
        gpu_hours=share.processes * share.gpus * hours,
        cost_usd=devices * hours * hardware.price_usd_per_hour,
    )


def _budget(share: Share, hardware: Hardware) -> int:
    """Memory that a process may use: of its part of one GPU, of each where it has several, or of all its CPU cores."""
    return int((min(share.gpus, 1.0) or share.cpus) * hardware.memory_bytes)


def _lowest_stage(work: PpoWork, learners: Share) -> int | None:
    budget = _budget(learners, work.machines.learners)
    for stage in (0, 1, 2, 3):
        engine = EngineSettings.model_validate({**work.learners.engine.model_dump(), "zero_stage": stage})
        if learner_memory(work.shape, learners.processes, engine, learners.device).total_bytes <= budget:
            return stage
    return None


def _lowest_ranks(work: PpoWork, generators: Share) -> int | None:
    """Without GPUs the parts of a divided model share one memory, so that dividing it saves none."""
    longest = work.max_prompt_tokens + work.sampling.max_response_tokens
    hardware = work.machines.generators
    for ranks in range(1, hardware.devices_per_node + 1 if generators.gpus > 0 else 2):
        rollouts = work.rollouts.model_copy(update={"tensor_parallel": ranks})
        needs = generator_memory(work.shape, rollouts, longest, generators.device).total_bytes
        has = hardware.memory_bytes if ranks > 1 else _budget(generators, hardware)
        if needs <= has and not work.shape.undivided(ranks):
            return ranks
    return None


def _serving(work: PpoWork, serving: ServingSettings, longest: int) -> ServingPlan:
    device: Device = "gpu" if serving.gpus > 0 else "cpu"
    memory = serving_memory(work.shape, serving.dtype, serving.kv_cache_mib, serving.max_concurrent, longest, device)
    return ServingPlan(
        engines=serving.engines,
        engine_bytes=memory.total_bytes,
        engine_budget_bytes=int(serving.engine_gib * GIB),
        replicas=(serving.min_replicas, serving.max_replicas),
    )


def _remarks(
    work: PpoWork,
    shares: Shares,
    roles: tuple[RolePlan, ...],
    lowest: Lowest,
    needed: int | None,
    kv_sequences: int,
    update: UpdateTime,
) -> list[str]:
    said = []
    stage, ranks = work.learners.engine.zero_stage, work.rollouts.tensor_parallel
    for role in roles:
        if role.fits:
            continue
        lack = (
            f"{role.role}: a process is reckoned to need {role.memory_total_bytes / GIB:.1f} GiB of {role.hardware} "
            f"and has {role.memory_budget_bytes / GIB:.1f} GiB"
        )
        said.append(f"{lack}; {_cure(role.role, stage, ranks, lowest)}")
    if lowest.zero_stage is not None and lowest.zero_stage < stage:
        said.append(f"ZeRO stage {lowest.zero_stage} would fit too (the recipe has {stage}).")
    if lowest.ranks is not None and lowest.ranks < ranks:
        said.append(f"Tensor parallelism {lowest.ranks} would fit too (the recipe has {ranks}).")
    undivided = work.shape.undivided(ranks)
    if undivided:
        said.append(f"rollouts.tensor_parallel {ranks} cannot be: {undivided}.")
    if shares.learners.gpus > 1:
        said.append(
            f"learners.gpus {shares.learners.gpus:g}: a learner rank uses one GPU; the others would stand idle."
        )
    if shares.generators.gpus > max(ranks, 1):
        said.append(
            f"rollouts.gpus {shares.generators.gpus:g}: a generator uses as many GPUs as rollouts.tensor_parallel "
            f"says, {ranks}; the others would stand idle."
        )
    if kv_sequences < 1:
        said.append(
            f"rollouts.kv_cache_mib {work.rollouts.kv_cache_mib} holds no sequence of full length; vLLM will refuse it."
        )
    elif kv_sequences < min(work.rollouts.max_concurrent, work.ppo.batch_size // work.rollouts.generators):
        said.append(
            f"An engine's keys and values hold {kv_sequences} sequences of full length: fewer than it could work on at "
            "once; a larger rollouts.kv_cache_mib generates faster."
        )
    said.append(_who_waits(work, needed, update))
    return said


def _cure(role: str, stage: int, ranks: int, lowest: Lowest) -> str:
    if role == "learners":
        if lowest.zero_stage is not None and lowest.zero_stage > stage:
            return f"ZeRO stage {lowest.zero_stage} fits (learners.engine.zero_stage={lowest.zero_stage})."
        return (
            "give more learners.workers, activation checkpointing, fewer learners.engine.tokens_per_microbatch or a "
            "device with more memory."
        )
    if role == "generators":
        if lowest.ranks is not None and lowest.ranks > ranks:
            fits = f"rollouts.tensor_parallel={lowest.ranks} rollouts.gpus={lowest.ranks}"
            return f"tensor parallelism {lowest.ranks} fits ({fits})."
        return "give fewer rollouts.kv_cache_mib or a device with more memory."
    return "give fewer scoring.rows_per_batch, a larger share of a device, or scoring.fused: false."


def _who_waits(work: PpoWork, needed: int | None, update: UpdateTime) -> str:
    generators = work.rollouts.generators
    enough = "no number of generators keeps up with the learner" if needed is None else f"{needed} keep up with it"
    if work.ppo.max_staleness == 0:
        return (
            f"At ppo.max_staleness 0 learner and generators take turns: the learner waits {update.learner_waits_s:.3g} "
            f"s of an update of {update.update_s:.3g} s. With 1 they work at the same time, and {enough}."
        )
    if update.learner_waits_s > 0.05 * update.update_s:
        slowest = "scoring" if update.score_s > update.generate_steady_s else f"{generators} generators"
        return f"The learner waits {update.learner_waits_s:.3g} s of {update.update_s:.3g} s for {slowest}; {enough}."
    if update.generators_wait_s > 0.05 * update.update_s:
        return f"The generators wait {update.generators_wait_s:.3g} s of {update.update_s:.3g} s; {enough}."
    return "Neither learner nor generators wait."


def shares_of(learners: Share, generators: Share, scoring: ScoringSettings) -> Shares:
    """The shares of all roles: scoring processes have what `scoring` says."""
    references = None if scoring.fused else Share(scoring.references, scoring.threads, scoring.gpus)
    return Shares(learners, generators, Share(scoring.scorers, scoring.threads, scoring.gpus), references)


def work_machines(shares: Shares, gpu: Hardware, cpu: Hardware) -> Machines:
    """What each role computes on: `gpu` where it has any, else `cpu`."""

    def of(share: Share) -> Hardware:
        return gpu if share.gpus > 0 else cpu

    return Machines(of(shares.learners), of(shares.generators), of(shares.scorers))
