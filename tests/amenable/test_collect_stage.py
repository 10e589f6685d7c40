"""The collect stage without engines: which rankings it keeps, and which it refuses before a reward model is trained."""

from pathlib import Path

import pyarrow as pa
import pytest

from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec
from amenable.stages import collect, data
from amenable.stages.context import Context
from corpus.problems import UsageProblem
from corpus.schemas import read_table, write_table

SIZES = {"pretraining_train": 10, "demonstrations_train": 10, "prompts_ppo": 10, "prompts_heldout": 10}


def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **labelers: float) -> tuple[StageSpec, dict]:
    """What the stage comes to whose SFT model answers everything with one word."""
    world = {**SIZES, "prompts_collect": 100, "prompts_per_user": 5, "labelers": labelers}
    given = {"name": "w", "run_directory": tmp_path, "world": world, "collect": {"held_out_fraction": 0.3}}
    recipe = Recipe.model_validate(given)
    run = RunDirectory(recipe.run_directory)
    context = Context(recipe, run, Progress(json=True), None)  # type: ignore[arg-type]
    run.data.mkdir()
    prompts = data._world_tables(recipe, run.data / "tokenizer")["prompts-collect"]
    write_table(prompts, context.data("prompts-collect"), "prompts")

    def sample(context: Context, prompts: pa.Table, samples: int, *rest: object) -> pa.Table:
        ids = [each for each in prompts["prompt_id"].to_pylist() for _ in range(samples)]
        answers = pa.array([[7]] * len(ids), pa.list_(pa.int32()))
        return pa.table({"prompt_id": ids, "response": ["word"] * len(ids), "response_tokens": answers})

    monkeypatch.setattr(collect, "sample", sample)
    monkeypatch.setattr(collect, "sft_epoch", lambda context, which: "epoch")
    monkeypatch.setattr(collect, "load_into_generators", lambda *given: None)
    spec = StageSpec("collect", tmp_path / "collect", {})
    spec.directory.mkdir()
    return spec, collect.run(context, spec).values


def test_rankings_of_users_who_validate_are_apart_and_every_response_is_ranked(tmp_path, monkeypatch):
    spec, values = collected(tmp_path, monkeypatch)
    train, valid, unseen = (
        read_table(str(spec.directory / f"comparisons-{name}.parquet"), "comparisons").to_pylist()
        for name in ("train", "valid", "heldout-labelers")
    )
    assert len(train) + len(valid) == 100
    assert not {row["user_id"] for row in train} & {row["user_id"] for row in valid}
    assert [row["prompt_id"] for row in unseen] == [row["prompt_id"] for row in valid]
    assert not {row["labeler_id"] for row in unseen} & {row["labeler_id"] for row in (*train, *valid)}
    assert sum(len(row["ranks"]) for row in (*train, *valid)) == values["responses"]
    assert {len(row["ranks"]) for row in train} == set(range(4, 10))


def test_rankings_that_are_all_ties_end_the_run_before_a_reward_model_is_trained(tmp_path, monkeypatch):
    with pytest.raises(UsageProblem, match=r"comparisons-train has \d+ rows, and in each of them all responses tie"):
        collected(tmp_path, monkeypatch, tie_width=100.0)
    assert not list((tmp_path / "collect").iterdir())
