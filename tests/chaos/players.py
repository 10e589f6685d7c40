"""The actors of a PPO stage, each the real one, which also says who it is and lingers in its phases."""

import inspect
from typing import Any

import phases
import ray
from torch_engine import TorchEngine

from actors import conductor, generator, scoring, stream, weight_store
from actors.episodes import oldest_weights


def plain(actor: Any) -> Any:
    """The class that a Ray actor class was made of."""
    return actor.__ray_metadata__.modified_class


def enter() -> None:
    """Has whoever makes an actor of a PPO stage in this process make one of these. They are called as the real ones
    are, because sentences about a death take a role's name from there."""

    class RolloutGenerator(plain(generator.RolloutGenerator)):
        def __init__(self, *given: Any) -> None:
            phases.register("generator")
            super().__init__(*given)

        def _start(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> str:
            if phases.engine() == "vLLM":
                from vllm_engine import VllmEngine

                start = super()._start
                # Ray sends an actor's class by value: its methods look names up in a copy of their module's.
                inspect.unwrap(start.__func__).__globals__["RolloutEngine"] = VllmEngine
                return start(model_directory, tokenizer, max_sequence_tokens)
            from models.build import load_tokenizer

            self._tokenizer = load_tokenizer(tokenizer)
            self._engine = TorchEngine(model_directory)
            return self._name

    class ScoringWorker(plain(scoring.ScoringWorker)):
        def load_reward(self, *given: Any) -> None:
            phases.register("scorer")
            super().load_reward(*given)

        def load_reference(self, directory: str) -> None:
            phases.register("reference")
            super().load_reference(directory)

        def score(self, episodes: Any) -> list[float]:
            phases.linger("scorer", "generating", max(update for _, update in oldest_weights(episodes)))
            return super().score(episodes)

        def reference_logprobs(self, episodes: Any, temperature: float) -> list[list[float]]:
            phases.linger("reference", "generating", max(update for _, update in oldest_weights(episodes)))
            return super().reference_logprobs(episodes, temperature)

    class EpisodeStream(plain(stream.EpisodeStream)):
        def __init__(self, plan: Any) -> None:
            phases.register("stream")
            super().__init__(plan)

        async def accept(self, episodes: Any, scores: Any, logprobs: Any) -> int:
            phases.linger("stream", "generating", max(update for _, update in oldest_weights(episodes)))
            return await super().accept(episodes, scores, logprobs)

        async def advance(self, attempt: int, version: int) -> None:
            phases.linger("stream", "publishing", version)
            await super().advance(attempt, version)

        async def state(self, attempt: int) -> Any:
            phases.linger("stream", "checkpointing", self._ledger.trained)
            return await super().state(attempt)

    class WeightStore(plain(weight_store.WeightStore)):
        def __init__(self, *given: Any) -> None:
            phases.register("weight store")
            super().__init__(*given)

        def put(self, snapshot: Any) -> list[Any]:
            phases.linger("weight store", "publishing", snapshot.version[1])
            return super().put(snapshot)

    class Conductor(plain(conductor.Conductor)):
        def __init__(self, *given: Any) -> None:
            phases.register("conductor")
            super().__init__(*given)

    beside: dict[str, Any] = {"concurrency_groups": {"health": 1}}
    generator.RolloutGenerator = ray.remote(num_cpus=1, max_concurrency=16, **beside)(RolloutGenerator)
    scoring.ScoringWorker = ray.remote(**beside)(ScoringWorker)
    stream.EpisodeStream = ray.remote(num_cpus=0)(EpisodeStream)
    weight_store.WeightStore = ray.remote(num_cpus=0)(WeightStore)
    conductor.Conductor = ray.remote(num_cpus=0)(Conductor)
