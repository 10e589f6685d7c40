"""Sampling and scoring outside PPO, with stand-ins for the actors: what is kept, what is made again, what is shown."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from amenable.interruption import Interrupted, listening
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stages.context import Context
from amenable.stages.kept_samples import SAMPLES_PARTIAL, KeptSamples
from amenable.stages.sampling import reference_logprobs, reward_scores, sample
from corpus.problems import RunProblem
from corpus.schemas import make_table


class Call:
    """`actor.method.remote(…)` answers at once."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Actor:
    """Generator, scorer and reference; `sampled` are the prompts of every slice that was asked of it."""

    def __init__(self) -> None:
        self.sampled: list[list[str]] = []
        self.rows: list[int] = []
        self.sample = Call(self._sample)
        self.score_pairs = Call(self._score)
        self.logprobs_of = Call(lambda prompts, responses, temperature: [[-temperature] * len(r) for r in responses])

    def _sample(self, prompts: pa.Table, samples: int, sampling: Any, seed: int) -> pa.Table:
        ids = prompts["prompt_id"].to_pylist()
        self.sampled.append(ids)
        rows = [(prompt, number) for prompt in ids for number in range(samples)]
        return make_table(
            "samples",
            {
                "prompt_id": [prompt for prompt, _ in rows],
                "sample": [number for _, number in rows],
                "prompt_tokens": [[1]] * len(rows),
                "response_tokens": [[seed, number + 1] for _, number in rows],
                "response": [f"{seed}/{prompt}/{number}" for prompt, number in rows],
                "logprobs": [[-1.0, -2.0]] * len(rows),
                "finish_reason": ["stop"] * len(rows),
            },
        )

    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        self.rows.append(len(responses))
        return [float(response[-1]) for response in responses]


class StandInCrew:
    """One actor for everything; answers come in the wrong order."""

    def __init__(self) -> None:
        self.actor = Actor()
        self.after: Callable[[int], None] = lambda answers: None

    def generators(self, *_: Any) -> dict[str, Any]:
        return {"generator-0": self.actor}

    def scoring_pools(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"scoring-0": self.actor}, {"scoring-0": self.actor}

    def have_done(
        self, actors: Mapping[str, Any], calls: Sequence[Callable[[Any], Any]], what: str
    ) -> Iterator[tuple[int, Any]]:
        [actor] = actors.values()
        for count, number in enumerate(reversed(range(len(calls)))):
            self.after(count)
            yield number, calls[number](actor)


@pytest.fixture
def crew() -> StandInCrew:
    return StandInCrew()


@pytest.fixture
def context(tmp_path: Path, crew: StandInCrew) -> Context:
    """Slices are 8 prompts of 2 samples each; a stage is under way."""
    return context_of(tmp_path, crew, max_concurrent=4)


def context_of(tmp_path: Path, crew: Any, max_concurrent: int) -> Context:
    settings = {"name": "small", "rollouts": {"max_concurrent": max_concurrent}, "scoring": {"rows_per_batch": 48}}
    progress = Progress(["eval"], json=True)
    progress.stage("eval")
    return Context(Recipe.model_validate(settings), RunDirectory(tmp_path / "run"), progress, crew)


PROMPTS = pa.table({"prompt_id": [f"p{number}" for number in range(20)], "prompt_tokens": [[1]] * 20})


def test_samples_come_in_the_prompts_order_whatever_was_answered_first(context, tmp_path):
    found = sample(context, PROMPTS, 2, 7, tmp_path, "sft")
    wanted = [f"7/p{number}/{sample}" for number in range(20) for sample in range(2)]
    assert found["response"].to_pylist() == wanted
    assert context.progress.where() == "eval, 40 of 40 responses"


def test_what_was_sampled_before_a_stop_is_not_sampled_again(context, crew, tmp_path):
    whole = sample(context, PROMPTS, 2, 7, tmp_path / "whole", "sft")
    crew.actor.sampled.clear()
    crew.after = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 1 else None
    with listening(), pytest.raises(Interrupted, match="sampling, 24 of 40 responses"):
        sample(context, PROMPTS, 2, 7, tmp_path, "sft")
    assert [len(prompts) for prompts in crew.actor.sampled] == [4, 8]
    crew.after = lambda count: None
    crew.actor.sampled.clear()
    assert sample(context, PROMPTS, 2, 7, tmp_path, "sft").equals(whole)
    assert crew.actor.sampled == [[f"p{number}" for number in range(8)]]
    crew.actor.sampled.clear()
    assert sample(context, PROMPTS, 2, 7, tmp_path, "sft").equals(whole)
    assert crew.actor.sampled == []


def test_samples_of_another_label_are_its_own(context, crew, tmp_path):
    sample(context, PROMPTS, 2, 7, tmp_path, "sft")
    crew.actor.sampled.clear()
    sample(context, PROMPTS, 2, 7, tmp_path, "ppo")
    assert sum(map(len, crew.actor.sampled)) == 20


def test_a_damaged_slice_and_one_that_was_cut_otherwise_are_sampled_again(context, crew, tmp_path):
    whole = sample(context, PROMPTS, 2, 7, tmp_path, "sft")
    kept = sorted((tmp_path / SAMPLES_PARTIAL).iterdir())
    assert [path.name for path in kept] == ["sft-00000.parquet", "sft-00001.parquet", "sft-00002.parquet"]
    kept[1].write_bytes(kept[1].read_bytes()[:100])
    crew.actor.sampled.clear()
    assert sample(context, PROMPTS, 2, 7, tmp_path, "sft").equals(whole)
    assert crew.actor.sampled == [[f"p{number}" for number in range(8, 16)]]
    crew.actor.sampled.clear()
    wider = context_of(tmp_path, crew, max_concurrent=5)
    assert sample(wider, PROMPTS, 2, 7, tmp_path, "sft")["response"].equals(whole["response"])
    assert sum(map(len, crew.actor.sampled)) == 20


def test_a_slice_with_another_number_of_samples_does_not_count(tmp_path):
    kept = KeptSamples(tmp_path, "sft")
    kept.keep(0, Actor()._sample(PROMPTS, 2, None, 7))
    assert kept.read(0, PROMPTS, 2) is not None
    assert kept.read(0, PROMPTS, 3) is None
    assert kept.read(1, PROMPTS, 2) is None


def test_nothing_is_kept_once_the_run_was_taken_over(context, crew, tmp_path):
    def lost() -> None:
        raise RunProblem("taken over", "run/unexpected")

    fenced = Context(context.recipe, context.run, context.progress, crew, lost)
    with pytest.raises(RunProblem, match="taken over"):
        sample(fenced, PROMPTS, 2, 7, tmp_path, "sft")
    assert not (tmp_path / SAMPLES_PARTIAL).exists()


def test_scores_are_in_the_tables_order_and_seen_to_come(context, crew):
    table = pa.table({"prompt_tokens": [[1]] * 300, "response_tokens": [[number + 1] for number in range(300)]})
    seen: list[str] = []
    crew.after = lambda count: seen.append(context.progress.where())
    assert reward_scores(context, table) == [float(number + 1) for number in range(300)]
    assert sorted(crew.actor.rows) == [12, 96, 96, 96]  # whole batches of 48
    assert seen[1:] == ["eval, 12 of 300 scores", "eval, 108 of 300 scores", "eval, 204 of 300 scores"]
    assert reference_logprobs(context, table, 0.5) == [[-0.5]] * 300
    assert context.progress.where() == "eval, 300 of 300 reference scores"
