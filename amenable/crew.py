"""The actors of a run, started when they are first needed and kept for the stages after.

Start-up costs seconds of imports: generators begin theirs in the background while earlier stages still train.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from actors.exported_metrics import run_tag
from amenable import interruption
from amenable.answers import answer_of_each, answers_to_all
from amenable.progress import Progress
from amenable.recipe import Recipe
from corpus.problems import RunProblem
from corpus.run_epoch import RunEpoch


class Crew:
    """Learner group, generators and scoring processes of one run. Use as a context manager.

    `run_epoch` is the holder of the run's lease for whom the learners write; None where they write nothing. `hold` is
    told of the GPUs that a role holds from now on.
    """

    def __init__(
        self,
        recipe: Recipe,
        storage: Path,
        progress: Progress,
        address: str | None,
        run_epoch: RunEpoch | None = None,
        hold: Callable[[str, float], None] = lambda role, gpus: None,
    ) -> None:
        self._recipe = recipe
        self._hold = hold
        self._storage = storage
        self._progress = progress
        self._address = address
        self._run_epoch = run_epoch
        self.run_tag = run_tag(recipe.run_directory)
        """The run's tag in exported metrics."""
        self._session: Any = None
        self._stage: str | None = None
        self._learners: Any = None
        self._learners_ready = False
        self._generators: dict[str, Any] = {}
        self._rooms: dict[str, Any] = {}
        self._starting: dict[str, Any] = {}
        self._scoring: dict[str, Any] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Learners that are still at their imports would not hear that they may leave; the session's end ends them.
            if self._learners is not None and self._learners_ready:
                self._learners.close()
        except Exception:
            if kind is None:  # else what went wrong before is what a person must hear of
                raise
        finally:
            if self._session is not None:
                self._session.__exit__(None, None, None)

    def join(self) -> None:
        """Begins the Ray session, where it has not begun yet; nothing is reserved by that."""
        self._ray()

    @property
    def run_epoch(self) -> RunEpoch | None:
        """The holder of the run's lease for whom the actors write; None where they write nothing."""
        return self._run_epoch

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Around a stage: exports, where there is a Ray session, that it is under way."""
        self._stage = stage
        self._export_stage(is_over=False)
        try:
            yield
        finally:
            self._export_stage(is_over=True)
            self._stage = None

    def _export_stage(self, is_over: bool) -> None:
        if self._session is None or self._stage is None:
            return
        from actors.exported_metrics import RUN_STAGE
        from actors.telemetry import Telemetry

        telemetry = Telemetry(self.run_tag, "driver")
        if is_over:
            telemetry.clear(RUN_STAGE, stage=self._stage)
        else:
            telemetry.set(RUN_STAGE, 1.0, stage=self._stage)

    def _ray(self) -> Any:
        """Ray, initialised."""
        import ray

        if self._session is None:
            from cluster.session import session

            where = "Ray to start" if self._address is None else f"the Ray cluster at {self._address}"
            self._session = session(
                self._address,
                self._cpus(),
                meanwhile=partial(interruption.stop_if_requested, f"waiting for {where}"),
                run=self._recipe.name,
            )
            with self._progress.waiting(where):
                self._session.__enter__()
            self._export_stage(is_over=False)
        return ray

    def _cpus(self) -> int:
        """CPUs that all roles together may ask for; a local session offers them, and the roles take turns."""
        recipe = self._recipe
        scoring = recipe.scoring.scorers + (0 if recipe.scoring.fused else recipe.scoring.references)
        return (
            recipe.learners.workers * recipe.learners.threads
            + max(recipe.rollouts.generators, recipe.fleet.max_generators) * recipe.rollouts.threads
            + scoring * recipe.scoring.threads
            + 1
        )

    def ranks(self) -> Any:
        """What the learner group is asked of Ray: a `learners.ranks.Ranks`."""
        from learners.ranks import Ranks

        settings = self._recipe.learners
        return Ranks(settings.workers, settings.threads, settings.gpus, settings.placement, settings.node_labels)

    def learners(self) -> Any:
        """The learner group, started on the first call."""
        if self._learners is None:
            self._ray()
            from learners.group import LearnerGroup, Patience

            settings = self._recipe.learners
            self._hold("learners", settings.workers * settings.gpus)
            self._learners = LearnerGroup(
                self.ranks(),
                str(self._storage),
                Patience(**{name: getattr(settings, name) for name in Patience.__dataclass_fields__}),
                self._run_epoch,
                self._progress.note,
                self.run_tag,
            )
        return self._learners

    def ready_learners(self) -> Any:
        """The learner group, once all its ranks are ready.

        Raises RunProblem where they are not in time, learners.worker.Interrupted where a stop is asked for.
        """
        group = self.learners()
        if not self._learners_ready:
            with self._progress.waiting("the learners to start"):
                group.wait_until_ready(interruption.requested)
            self._learners_ready = True
        return group

    def generator_spec(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> Any:
        """How a generator is made: an `actors.recruits.WorkerSpec`."""
        from actors.generator import RolloutGenerator
        from actors.recruits import Call, WorkerSpec
        from cluster.bundles import bundle_of
        from cluster.placement import OwnPlacementGroup

        settings = self._recipe.rollouts
        return WorkerSpec(
            RolloutGenerator,
            _resources(settings.threads, settings.gpus, self.run_tag),
            (settings,),
            (Call("start", (model_directory, tokenizer, max_sequence_tokens)),),
            OwnPlacementGroup(bundle_of(settings.threads, settings.gpus), settings.node_labels),
        )

    def start_generators(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> None:
        """Begin to start the generators that there are not, in the background."""
        names = [f"generator-{number}" for number in range(self._recipe.rollouts.generators)]
        missing = [name for name in names if name not in self._generators]
        if not missing:
            return
        self._ray()
        spec = self.generator_spec(model_directory, tokenizer, max_sequence_tokens)
        for name in missing:
            if name not in self._rooms:
                self._rooms[name] = spec.placement.reserve(name)
            self._generators[name] = spec.make(name, self._rooms[name])
            for call in spec.start:
                self._starting[name] = call.on(self._generators[name])
        self._generators = {name: self._generators[name] for name in names}
        self.generators_serve(len(names))

    def generators_serve(self, count: int) -> None:
        """Note that so many generators hold their GPUs from now on: they come and go while PPO trains."""
        self._hold("generators", count * self._recipe.rollouts.gpus)

    def generators(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> dict[str, Any]:
        """The generators by name, ready. Waits for them up to the start deadline."""
        self.start_generators(model_directory, tokenizer, max_sequence_tokens)
        with self._progress.waiting("the generators to start (vLLM's imports take a while)"):
            try:
                answer_of_each(
                    self._starting,
                    "the generators to start",
                    self._recipe.learners.start_deadline_s,
                    "learners.start_deadline_s",
                )
            except RunProblem as problem:
                raise self._without_room(problem) from problem
        return self._generators

    def _without_room(self, problem: RunProblem) -> RunProblem:
        """The problem, with the generators for which the cluster has no room, where that is why they are late."""
        from cluster.bundles import bundle_of
        from cluster.placement import OwnPlacementGroup

        settings = self._recipe.rollouts
        placement = OwnPlacementGroup(bundle_of(settings.threads, settings.gpus), settings.node_labels)
        waiting = [name for name, room in self._rooms.items() if not placement.wait(room, 0.0)]
        if not waiting:
            return problem
        return RunProblem(
            f"{problem} {', '.join(waiting)} wait for a bundle of {placement.says()} each, which the cluster does not "
            "have free.",
            "placement/no-room",
        )

    @property
    def rooms(self) -> dict[str, Any]:
        """The placement groups of the generators, by name."""
        return dict(self._rooms)

    def keep_only(self, survivors: Collection[str]) -> None:
        """Forget generators and scoring processes that are not among `survivors`; they are started anew when they are
        needed again."""
        self._generators = {name: each for name, each in self._generators.items() if name in survivors}
        self._starting = {name: each for name, each in self._starting.items() if name in survivors}
        self._scoring = {name: each for name, each in self._scoring.items() if name in survivors}
        for name in [name for name in self._rooms if name not in survivors]:
            # Whether the conductor has given the room back or not: a new generator asks for its own.
            self._release_room(self._rooms.pop(name))

    def _release_room(self, room: Any) -> None:
        from cluster.placement import OwnPlacementGroup

        OwnPlacementGroup({}).release(room)

    def scoring_spec(self, *start: Any) -> Any:
        """How a scoring process is made that begins with the calls `start`: an `actors.recruits.WorkerSpec`."""
        from actors.recruits import WorkerSpec
        from actors.scoring import ScoringWorker

        settings = self._recipe.scoring
        options = _resources(settings.threads, settings.gpus, self.run_tag)
        if settings.node_labels:
            options["label_selector"] = dict(settings.node_labels)
        return WorkerSpec(ScoringWorker, options, (settings,), start)

    def scoring(self) -> dict[str, Any]:
        """The scoring processes by name: all fused, or scorers first and references after them."""
        settings = self._recipe.scoring
        count = settings.scorers + (0 if settings.fused else settings.references)
        names = [f"scoring-{number}" for number in range(count)]
        if any(name not in self._scoring for name in names):
            self._ray()
            spec = self.scoring_spec()
            self._scoring = {name: self._scoring.get(name) or spec.make(name) for name in names}
            self._hold("scoring", count * settings.gpus)
        return self._scoring

    def scoring_pools(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(reward scorers, references), by name; the same processes where they are fused."""
        actors = self.scoring()
        from actors.scoring import pools

        settings = self._recipe.scoring
        scorers, references = pools(list(actors), settings.fused, settings.scorers)
        return {name: actors[name] for name in scorers}, {name: actors[name] for name in references}

    def wait_for(self, calls: Mapping[str, Any], what: str) -> dict[str, Any]:
        """The answers to `calls`, by the names of the actors; meanwhile progress says that the run waits for `what`.

        Raises RunProblem where no answer came for the recipe's `deadline_s` or an actor died, Interrupted where a stop
        is asked for.
        """
        with self._progress.waiting(what):
            return answer_of_each(calls, what, self._recipe.deadline_s)

    def have_done(
        self, actors: Mapping[str, Any], calls: Sequence[Callable[[Any], Any]], what: str
    ) -> Iterator[tuple[int, Any]]:
        """`answers_to_all` with the recipe's deadline: positions of `calls` and their answers, as they come."""
        return answers_to_all(actors, calls, what, self._recipe.deadline_s)


def _resources(threads: int, gpus: float, tag: str) -> dict[str, Any]:
    """Ray's options of an actor that computes with `threads` CPU threads for the run with this tag."""
    variables = {"OMP_NUM_THREADS": str(threads), "AMENABLE_RUN_TAG": tag}
    return {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}
