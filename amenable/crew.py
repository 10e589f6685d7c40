"""The actors of a run, started when they are first needed and kept for the stages after.

Start-up costs seconds of imports: generators begin theirs in the background while earlier stages still train.
"""

import time
from pathlib import Path
from typing import Any

from amenable import interruption
from amenable.progress import Progress
from amenable.recipe import Recipe
from corpus.problems import RunProblem


class Crew:
    """Learner group, generators and scoring processes of one run. Use as a context manager, inside a Ray session."""

    def __init__(self, recipe: Recipe, storage: Path, progress: Progress, address: str | None) -> None:
        self._recipe = recipe
        self._storage = storage
        self._progress = progress
        self._address = address
        self._session: Any = None
        self._learners: Any = None
        self._generators: dict[str, Any] = {}
        self._starting: list[Any] = []
        self._scoring: list[Any] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._learners is not None:
            self._learners.close()
        if self._session is not None:
            self._session.__exit__(None, None, None)

    def _ray(self) -> Any:
        """Ray, initialised."""
        import ray

        if self._session is None:
            from cluster.session import session

            self._session = session(self._address, self._cpus())
            with self._progress.waiting("Ray to start"):
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
                settings.workers, settings.threads, settings.gpus, str(self._storage), settings.start_deadline_s
            )
        return self._learners

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
        self._starting = [
            generator.start.remote(model_directory, tokenizer, max_sequence_tokens)
            for generator in self._generators.values()
        ]

    def generators(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> dict[str, Any]:
        """The generators by name, ready. Waits for them up to the start deadline."""
        self.start_generators(model_directory, tokenizer, max_sequence_tokens)
        self.wait_for(self._starting, "the generators to start (vLLM's imports take a while)")
        return self._generators

    def scoring(self) -> list[Any]:
        """The scoring processes: all fused, or scorers first and references after them."""
        if not self._scoring:
            self._ray()
            from actors.scoring import ScoringWorker

            settings = self._recipe.scoring
            count = settings.scorers + (0 if settings.fused else settings.references)
            actor: Any = ScoringWorker
            environment = {"OMP_NUM_THREADS": str(settings.threads)}
            self._scoring = [
                actor.options(
                    num_cpus=settings.threads, num_gpus=settings.gpus, runtime_env={"env_vars": environment}
                ).remote(f"scoring-{number}", settings)
                for number in range(count)
            ]
        return self._scoring

    def scoring_pools(self) -> tuple[list[Any], list[Any]]:
        """(reward scorers, references); the same processes where they are fused."""
        from actors.scoring import pools

        return pools(self.scoring(), self._recipe.scoring.fused, self._recipe.scoring.scorers)

    def wait_for(self, answers: list[Any], what: str) -> list[Any]:
        """The answers of actors; meanwhile progress says that the run waits for `what`.

        Raises RunProblem after the start deadline, Interrupted where a stop is asked for.
        """
        import ray

        deadline = time.monotonic() + self._recipe.learners.start_deadline_s
        with self._progress.waiting(what):
            while True:
                _, late = ray.wait(answers, num_returns=len(answers), timeout=1.0)
                if not late:
                    return ray.get(answers)
                if time.monotonic() > deadline:
                    raise RunProblem(
                        f"Waited {self._recipe.learners.start_deadline_s:.0f} s for {what}; "
                        f"{len(late)} of {len(answers)} did not answer."
                    )
                if interruption.requested():
                    raise interruption.Interrupted(f"waiting for {what}")
