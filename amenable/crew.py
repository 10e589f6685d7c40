"""The actors of a run, started when they are first needed and kept for the stages after.

Start-up costs seconds of imports: generators begin theirs in the background while earlier stages still train.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from amenable import interruption
from amenable.answers import answer_of_each, answers_to_all
from amenable.progress import Progress
from amenable.recipe import Recipe
from corpus.run_epoch import RunEpoch


class Crew:
    """Learner group, generators and scoring processes of one run. Use as a context manager.

    `run_epoch` is the holder of the run's lease for whom the learners write; None where they write nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        storage: Path,
        progress: Progress,
        address: str | None,
        run_epoch: RunEpoch | None = None,
    ) -> None:
        self._recipe = recipe
        self._storage = storage
        self._progress = progress
        self._address = address
        self._run_epoch = run_epoch
        self._session: Any = None
        self._learners: Any = None
        self._learners_ready = False
        self._generators: dict[str, Any] = {}
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
            )
            with self._progress.waiting(where):
                self._session.__enter__()
            interruption.listen()  # ray.init takes SIGTERM for itself
        return ray

    def _cpus(self) -> int:
        """CPUs that all roles together ask for; a local session offers them, and the roles take turns."""
        recipe = self._recipe
        scoring = recipe.scoring.scorers + (0 if recipe.scoring.fused else recipe.scoring.references)
        return (
            recipe.learners.workers * recipe.learners.threads
            + recipe.rollouts.generators * recipe.rollouts.threads
            + scoring * recipe.scoring.threads
            + 1
        )

    def learners(self) -> Any:
        """The learner group, started on the first call."""
        if self._learners is None:
            self._ray()
            from learners.group import LearnerGroup

            settings = self._recipe.learners
            self._learners = LearnerGroup(
                settings.workers,
                settings.threads,
                settings.gpus,
                str(self._storage),
                settings.start_deadline_s,
                self._run_epoch,
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

    def start_generators(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> None:
        """Begin to start the generators, in the background, unless they were begun before."""
        if self._generators:
            return
        self._ray()
        from actors.generator import RolloutGenerator

        settings = self._recipe.rollouts
        environment = {"OMP_NUM_THREADS": str(settings.threads)}
        actor: Any = RolloutGenerator
        for number in range(settings.generators):
            name = f"generator-{number}"
            self._generators[name] = actor.options(
                num_cpus=settings.threads, num_gpus=settings.gpus, runtime_env={"env_vars": environment}
            ).remote(name, settings)
        self._starting = {
            name: generator.start.remote(model_directory, tokenizer, max_sequence_tokens)
            for name, generator in self._generators.items()
        }

    def generators(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> dict[str, Any]:
        """The generators by name, ready. Waits for them up to the start deadline."""
        self.start_generators(model_directory, tokenizer, max_sequence_tokens)
        with self._progress.waiting("the generators to start (vLLM's imports take a while)"):
            answer_of_each(
                self._starting,
                "the generators to start",
                self._recipe.learners.start_deadline_s,
                "learners.start_deadline_s",
            )
        return self._generators

    def scoring(self) -> dict[str, Any]:
        """The scoring processes by name: all fused, or scorers first and references after them."""
        if not self._scoring:
            self._ray()
            from actors.scoring import ScoringWorker

            settings = self._recipe.scoring
            count = settings.scorers + (0 if settings.fused else settings.references)
            actor: Any = ScoringWorker
            environment = {"OMP_NUM_THREADS": str(settings.threads)}
            for name in (f"scoring-{number}" for number in range(count)):
                self._scoring[name] = actor.options(
                    num_cpus=settings.threads, num_gpus=settings.gpus, runtime_env={"env_vars": environment}
                ).remote(name, settings)
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
