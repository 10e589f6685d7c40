"""The PPO stage: stream, weight store and conductor around the generators, scorers and learners of the run."""

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amenable.json_files import write_json
from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished
from amenable.stages.judge import gold_total
from amenable.stages.sampling import load_reference, load_reward, reward_call, start_actors
from amenable.stages.supervised import LOGS
from corpus.problems import RunProblem, UsageProblem

if TYPE_CHECKING:
    from actors.telemetry import Telemetry

PUBLICATION_DEADLINE_S = 300.0
SETTLE_S = 300.0
"""Seconds that a PPO stage which is through waits for its last weights to be published. House default."""
LOOK_S = 0.5
"""Seconds between two looks at that."""
STORE_FILE = "store.json"
"""In the stage's own directory while PPO trains: the Ray name of the weight store's actor, and its cluster."""
WEIGHTS = "weights"
"""Directory, in the stage's own, of the snapshots that the weight store keeps while PPO trains."""


def run(context: Context, spec: StageSpec) -> Finished:
    """Trains the policy, streaming episodes from the generators."""
    import ray

    from actors.conductor import Conductor, Fellowship, HeldOut
    from actors.exported_metrics import PROCESS_MEMORY
    from actors.fleet import share_of
    from actors.generator import Work
    from actors.recruits import Call
    from actors.stream import EpisodeStream, StreamPlan
    from actors.telemetry import Telemetry
    from actors.weight_store import WeightStore
    from corpus.schemas import read_table
    from learners.ppo import train_ppo
    from learners.ppo_job import PpoJob

    recipe, settings = context.recipe, context.recipe.ppo
    initial = str(context.round.ppo_init / "export")
    start_actors(context)
    context.crew.learners()
    engine = (context.base_model(), context.tokenizer, context.max_sequence_tokens())
    generators = context.crew.generators(*engine)
    load_reward(context)
    load_reference(context, initial)
    prompts = read_table(str(context.data("prompts-ppo")), "prompts")
    if prompts.num_rows == 0:
        raise UsageProblem("There are no prompts for PPO.", "data/empty")
    plan = StreamPlan(
        prompts=str(context.data("prompts-ppo")),
        directory=str(spec.directory / "episodes"),
        seed=recipe.seed,
        round_number=1,
        batch_size=settings.batch_size,
        chunk_size=settings.chunk_size,
        max_staleness=settings.max_staleness,
        batches=settings.updates,
        lease_s=settings.lease_s,
        run=context.crew.run_tag,
    )
    # Actor handles are typed as their classes by Ray's decorator, which type checkers do not follow.
    beside = context.crew.ranks().beside()
    stream: Any = EpisodeStream.options(**beside).remote(plan)  # pyright: ignore[reportAttributeAccessIssue]
    store_name = f"weights-{uuid.uuid4().hex}"
    store: Any = WeightStore.options(name=store_name, **beside).remote(  # pyright: ignore[reportAttributeAccessIssue]
        str(spec.directory / WEIGHTS), context.crew.run_tag
    )
    offer_weights(context, spec, store, store_name)
    conductor: Any = Conductor.options(**beside).remote(  # pyright: ignore[reportAttributeAccessIssue]
        stream,
        store,
        PUBLICATION_DEADLINE_S,
        recipe.deadline_s,
        recipe.fleet,
        str(spec.directory),
        context.crew.run_tag,
    )
    admissible = settings.batch_size * (settings.max_staleness + 1)
    reward, reference = reward_call(context), Call("load_reference", (initial,))
    fused = recipe.scoring.fused
    fellowship = Fellowship(
        context.crew.generator_spec(*engine),
        context.crew.scoring_spec(reward, *([reference] if fused else [])),
        context.crew.scoring_spec(reference),
        context.crew.rooms,
        admissible,
    )
    scorers, references = context.crew.scoring_pools()
    work = Work(
        recipe.name,
        1,
        stream,
        conductor,
        list(scorers.values()),
        list(references.values()),
        recipe.sampling,
        settings.chunk_size,
        share_of(admissible, len(generators), settings.chunk_size),
    )
    begun = conductor.begin.remote(generators, work, fellowship)
    context.crew.wait_for({"the conductor": begun}, "the conductor to begin")
    held_out = read_table(str(context.data("prompts-heldout")), "prompts").slice(0, settings.evaluation_prompts)
    job = PpoJob(
        identity=context.identity(spec),
        settings=settings,
        sampling=recipe.sampling,
        engine=recipe.learners.engine,
        seed=recipe.seed + 6,
        directory=spec.directory,
        stored=context.run.stored,
        tracked=context.tracked(),
        tokenizer=context.tokenizer,
        policy=initial,
        reward_model=value_start(context),
        pretraining=context.data("pretraining-train"),
        stream=stream,
        conductor=conductor,
        rollout_dtype=recipe.rollouts.dtype,
        rollout_transport=recipe.rollouts.transport,
        kv_kept=recipe.rollouts.kv_on_publish == "keep",
        answer_deadline_s=4 * (PUBLICATION_DEADLINE_S + recipe.deadline_s),
        held_out=HeldOut(held_out, 1, recipe.seed + 7, gold_total if recipe.synthetic else None),
    )
    telemetry = Telemetry(context.crew.run_tag, "driver")
    try:
        result = context.learn(train_ppo, job, memory_teller(conductor, telemetry))
        asked = {"the conductor": conductor.survivors.remote()}
        context.crew.keep_only(context.crew.wait_for(asked, "the conductor to say who is left")["the conductor"])
        settle(context, store)
    finally:
        telemetry.clear(PROCESS_MEMORY)  # what comes after PPO measures it no more
        (spec.directory / STORE_FILE).unlink(missing_ok=True)
        for actor in (conductor, store, stream):
            ray.kill(actor)
    names = ("policy", "ema", "value", "best", "attempts", "episodes", "evaluations.jsonl")
    made = [spec.directory / name for name in names]
    return Finished([*made, *(spec.directory / name for name in LOGS)], result)


def memory_teller(conductor: Any, telemetry: "Telemetry") -> Callable[[], None]:
    """What exports this process's memory, and tells the conductor of it, each time that it is called. A conductor that
    has not heard the last time is told nothing more: what waits for it does not grow while it stands still."""
    import ray

    from actors.exported_metrics import PROCESS_MEMORY
    from actors.pulse import resident_bytes
    from actors.role_reports import peak_bytes

    told: list[Any] = []

    def tell() -> None:
        telemetry.set(PROCESS_MEMORY, resident_bytes())
        if not told or ray.wait(told, timeout=0)[0]:
            told[:] = [conductor.hear_of_driver.remote(peak_bytes())]

    return tell


def settle(context: Context, store: Any) -> None:
    """Waits until the last weights are published everywhere, not beyond SETTLE_S: services elsewhere follow them."""
    give_up = time.monotonic() + SETTLE_S
    name, what = "the weight store", "the last weights to be published"
    try:
        while not context.crew.wait_for({name: store.is_settled.remote()}, what)[name]:
            if time.monotonic() > give_up:
                raise RunProblem(f"it took more than {SETTLE_S:g} s", "publication/settle")
            time.sleep(LOOK_S)
    except RunProblem as problem:  # what was trained is whole, and its exports follow
        context.progress.note(f"ppo: the last weights were not published ({problem}).")


def offer_weights(context: Context, spec: StageSpec, store: Any, name: str) -> None:
    """Tells services of this run where published weights are: in the store's actor, whose Ray name is `name`, and in
    RUN/published, on disk and in the object store that keeps the run."""
    import ray

    from actors.published import PUBLISHED
    from actors.stored_snapshots import StoredRun

    settings, stored = context.recipe.serving, context.run.stored
    if settings.publish_every:
        place = str(context.run.root / PUBLISHED)
        kept = StoredRun(stored.address, context.crew.run_epoch) if stored is not None else None
        told = store.publish_to.remote(
            place, context.identity(spec), settings.publish_every, settings.published_kept, kept
        )
        context.crew.wait_for({"the weight store": told}, "the weight store to begin to publish")
    runtime = ray.get_runtime_context()
    said = {"actor": name, "namespace": runtime.namespace, "cluster": runtime.gcs_address}
    write_json(spec.directory / STORE_FILE, said)


def value_start(context: Context) -> str:
    """The value network starts from the run's reward model (InstructGPT, appendix C.4)."""
    return str(context.round.reward_model / "export")
