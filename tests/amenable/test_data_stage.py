"""The data stage refuses tables that could not be trained on, before any learner is started."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec
from amenable.stages import data, evaluation
from amenable.stages.context import Context
from amenable.stages.evaluation import comparison_result
from corpus.hub import HubCard
from corpus.problems import UsageProblem
from corpus.tokenising import TokenLimits


class Crew:
    """Notes how often learners were started."""

    def __init__(self) -> None:
        self.started = 0

    def learners(self) -> None:
        self.started += 1


def stage(tmp_path: Path, rows: list[dict]) -> tuple[Context, StageSpec, Crew]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {"name": "rows", "run_directory": tmp_path / "run", "corpus": {"path": str(tmp_path / "rows.jsonl")}}
    )
    progress = Progress(json=True)
    progress.plan(["data"])
    progress.stage("data")
    run, crew = RunDirectory(recipe.run_directory), Crew()
    run.data.mkdir(parents=True)
    return Context(recipe, run, progress, crew), StageSpec("data", run.data, {}), crew  # type: ignore[arg-type]


def row(number: int, ranks: list[int]) -> dict:
    return {"prompt": f"Name fruit {number}.", "responses": ["An apple.", "A pear."], "ranks": ranks}


def test_comparisons_that_are_all_ties_are_refused_before_a_learner_is_started(tmp_path):
    context, spec, crew = stage(tmp_path, [row(number, [1, 1]) for number in range(60)])
    with pytest.raises(UsageProblem, match=r"comparisons-train has \d+ rows, and in each of them all responses tie"):
        data.run(context, spec)
    assert crew.started == 0


def test_a_row_that_is_wrong_is_told_before_a_learner_is_started(tmp_path):
    context, spec, crew = stage(tmp_path, [row(0, [0, 1]), {"prompt": "x"}])
    with pytest.raises(UsageProblem, match=r"rows\.jsonl:2"):
        data.run(context, spec)
    assert crew.started == 0


def test_comparisons_that_are_ranked_apart_pass_and_learners_start(tmp_path):
    context, spec, crew = stage(tmp_path, [row(number, [0, 1]) for number in range(60)])
    finished = data.run(context, spec)
    assert crew.started == 1
    assert not [name for name in finished.values if name.endswith("left-out")]
    assert (spec.directory / "comparisons-train.parquet").exists()


def test_rows_whose_prompt_is_held_out_are_counted_and_told(tmp_path, capfd):
    rows = [{**row(number, [0, 1]), "user_id": f"user {number}"} for number in range(60)]
    shared = [{**row(0, [0, 1]), "prompt": "Name a fruit.", "user_id": f"user {number}"} for number in range(20)]
    context, spec, _ = stage(tmp_path, rows + shared)
    values = data.run(context, spec).values
    assert values["comparisons-left-out"] > 0
    said = f"{values['comparisons-left-out']} of comparisons"
    assert "rows left out of training, because their prompt is held out: " in (told := capfd.readouterr().err)
    assert said in told


def stage_of_long_and_short(tmp_path: Path, longest_prompt: int) -> tuple[Context, StageSpec]:
    rows = [
        {**row(number, [0, 1]), "prompt": f"Name fruit {number}." + " Please." * (0 if number % 4 else 30)}
        for number in range(80)
    ]
    context, spec, _ = stage(tmp_path, rows)
    limits = TokenLimits(max_prompt_tokens=longest_prompt, max_response_tokens=50, context_tokens=200)
    recipe = context.recipe.model_copy(update={"tokens": limits})
    return Context(recipe, context.run, context.progress, context.crew), spec


def test_rows_that_are_too_long_are_counted_by_table_and_told(tmp_path, capfd):
    context, spec = stage_of_long_and_short(tmp_path, 40)
    values = data.run(context, spec).values
    counted = [values[f"comparisons-{side}-long-prompts"] for side in ("train", "valid")]
    assert sum(counted) == 20
    assert sum(values[f"comparisons-{side}"] for side in ("train", "valid")) == 60
    told = capfd.readouterr().err
    assert "data: rows left out because of prompts of more than 40 tokens (tokens.max_prompt_tokens): " in told
    assert f"{counted[0]} of comparisons-train, {counted[1]} of comparisons-valid" in told
    assert "cut" not in told


def test_where_all_fits_nothing_is_said_and_responses_that_are_cut_are_told(tmp_path, capfd):
    context, spec = stage_of_long_and_short(tmp_path, 150)
    values = data.run(context, spec).values
    assert not [name for name in values if "long" in name or "cut" in name]
    assert "left out" not in capfd.readouterr().err
    tables = {"comparisons-train": pa.table({"a": [1]}).replace_schema_metadata({"count.cut_responses": "3"})}
    assert data.filtered(tables) == {"comparisons-train-cut-responses": 3}
    assert data.told(tables, context.recipe.tokens) == [
        "responses of more than 50 tokens (tokens.max_response_tokens) that were cut: 3 of comparisons-train."
    ]


def test_a_file_of_comparisons_tells_rows_that_are_too_long_from_rows_that_all_tie(tmp_path):
    context, spec = stage_of_long_and_short(tmp_path, 40)
    data.run(context, spec)
    limits, file = context.recipe.tokens, tmp_path / "others.jsonl"

    def table_of(*rows: dict) -> pa.Table:
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
        return data.file_comparisons(str(file), str(spec.directory / "tokenizer"), limits)

    long = {**row(1, [0, 1]), "prompt": "Name a fruit." + " Please." * 30}
    found = table_of(long, row(2, [0, 1]), row(3, [1, 1]))
    assert found.num_rows == 2
    assert data.told({"others.jsonl": found}, limits) == [
        "rows left out because of prompts of more than 40 tokens (tokens.max_prompt_tokens): 1 of others.jsonl."
    ]
    with pytest.raises(UsageProblem, match=r"each of its 2 comparisons has a prompt of more than 40 tokens"):
        table_of(long, long)
    with pytest.raises(UsageProblem, match=r"no two responses of a prompt are ranked apart"):
        table_of(long, row(3, [1, 1]))
    with pytest.raises(UsageProblem, match=r"there are no comparisons"):
        table_of({"prompt": "Name a fruit.", "response": "An apple."})


def test_comparisons_of_ones_own_are_not_put_to_the_worlds_judge(tmp_path, monkeypatch):
    """Their rows do not say what the built-in world's judge reads; those of the world's own tables do."""
    table = pa.table(
        {
            "prompt_id": [str(number) for number in range(8)],
            "prompt_tokens": [[1]] * 8,
            "responses": [["an apple", "a house"]] * 8,
            "response_tokens": [[[2], [3]]] * 8,
            "ranks": [[0, 1]] * 8,
            "meta": [""] * 8,
        }
    )
    context = Context(Recipe(name="world"), RunDirectory(tmp_path), Progress(json=True), None)  # type: ignore[arg-type]
    assert context.recipe.synthetic
    scores = [1.0, 0.0] * 8
    monkeypatch.setattr("amenable.stages.evaluation.reward_scores", lambda context, flat: scores[: flat.num_rows])
    found = comparison_result(context, table, table, is_judged=False)
    assert (found.accuracy.rate, found.gold_accuracy) == (1.0, None)
    assert len(found.baselines) == 2
    with pytest.raises(json.JSONDecodeError):
        comparison_result(context, table, table, is_judged=True)


@pytest.mark.parametrize(
    ("reward", "loaded"), [({"kind": "function", "function": "some:function"}, ["trained"]), ({"kind": "trained"}, [])]
)
def test_the_accuracy_in_the_report_is_the_trained_models_whatever_rewards_ppo(tmp_path, monkeypatch, reward, loaded):
    recipe = Recipe.model_validate({"name": "world", "reward": reward})
    context = Context(recipe, RunDirectory(tmp_path), Progress(json=True), None)  # type: ignore[arg-type]
    found: list[str] = []
    monkeypatch.setattr(evaluation, "load_reward", lambda context, settings: found.append(settings.kind))
    monkeypatch.setattr(evaluation, "comparison_result", lambda *given, is_judged: tuple(found))
    monkeypatch.setattr("corpus.schemas.read_table", lambda path, name: path)
    assert list(evaluation.reward_model_result(context)) == loaded


def test_users_who_validate_the_reward_model_ask_what_no_other_user_asks(tmp_path):
    sizes = {"pretraining_train": 100, "demonstrations_train": 10, "prompts_ppo": 10, "prompts_heldout": 10}
    recipe = Recipe.model_validate({"name": "world", "world": sizes, "collect": {"held_out_fraction": 0.3}})
    asked = data._world_tables(recipe, tmp_path)["prompts-collect"].to_pylist()
    wording = re.compile(r"^(please |hey , )| (start with \S+|make it \S+|set it in the \S+) \.")
    instructions: dict[bool, set[str]] = {False: set(), True: set()}
    for row in asked:
        instructions[data.validates(recipe, row["user_id"])].add(wording.sub("", row["prompt"]))
    assert min(map(len, instructions.values())) > 100
    assert not instructions[True] & instructions[False]
    everyone = [row["user_id"] for row in asked]
    other = recipe.model_copy(update={"seed": 1})
    assert [data.validates(recipe, user) for user in everyone] != [data.validates(other, user) for user in everyone]


@pytest.mark.parametrize(("prompts", "fraction", "says"), [(40, 0.01, "None of the 2"), (20, 0.999, "Each of the 1")])
def test_a_world_that_would_leave_the_reward_model_without_a_side_is_told_before_any_training(
    tmp_path, prompts, fraction, says
):
    sizes = {"pretraining_train": 10, "demonstrations_train": 10, "prompts_ppo": 10, "prompts_heldout": 10}
    given = {"name": "w", "world": {**sizes, "prompts_collect": prompts}, "collect": {"held_out_fraction": fraction}}
    with pytest.raises(UsageProblem, match=rf"{says} users .* validates the reward model, .*; give more prompts"):
        data._world_tables(Recipe.model_validate(given), tmp_path)
    given["collect"] = {"held_out_fraction": 0.5}
    given["world"]["prompts_collect"] = 200
    assert data._world_tables(Recipe.model_validate(given), tmp_path)["prompts-collect"].num_rows == 200


def test_another_share_of_users_who_validate_makes_the_worlds_data_again_and_no_others():
    shares = [{"collect": {"held_out_fraction": share}} for share in (0.1, 0.2)]
    worlds = [data.reads(Recipe.model_validate({"name": "w", **share})) for share in shares]
    files = [data.reads(Recipe.model_validate({"name": "w", "corpus": {"path": "a"}, **share}), {}) for share in shares]
    assert worlds[0] != worlds[1]
    assert files[0] == files[1]


def corpus_of(**corpus: object) -> Recipe:
    return Recipe.model_validate({"name": "licences", "corpus": corpus})


def test_the_licence_of_a_data_set_is_the_recipes_or_its_cards_and_never_a_guess():
    recipe = corpus_of(path="mine.jsonl", licence="MIT", pretraining="hub:some/texts", prompts={"path": "theirs.jsonl"})
    cards = {"hub:some/texts": {"commit": "c0ffee", "licence": "cc-by-4.0"}}
    assert data.data_sets(recipe, cards) == {
        "mine.jsonl": {"licence": "MIT", "licence_from": "recipe"},
        "hub:some/texts": {"licence": "cc-by-4.0", "licence_from": "Hugging Face Hub", "commit": "c0ffee"},
        "theirs.jsonl": {"licence": "not stated"},
    }
    own = corpus_of(path="mine.jsonl", pretraining={"path": "hub:some/texts", "licence": "by contract"})
    assert data.data_sets(own, cards)["hub:some/texts"]["licence"] == "by contract"
    assert data.data_sets(own, {})["mine.jsonl"] == {"licence": "not stated"}
    [(name, says)] = data.data_sets(Recipe(name="world"), {}).items()
    assert (name, says["licence_from"]) == ("built-in world", "amenable")
    assert says["licence"] in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_a_licence_does_not_make_the_data_again():
    plain = corpus_of(path="a.jsonl", prompts={"path": "b.jsonl"})
    stated = corpus_of(path="a.jsonl", licence="MIT", prompts={"path": "b.jsonl", "licence": "MIT"})
    other = corpus_of(path="a.jsonl", prompts={"path": "c.jsonl"})
    reads = [data.reads(recipe, sources={}) for recipe in (plain, stated, other)]
    assert reads[0] == reads[1] != reads[2]


def test_what_the_hub_tells_is_kept_with_the_stage_and_its_silence_is_noted(tmp_path, monkeypatch, capfd):
    context, spec, _ = stage(tmp_path, [row(number, [0, 1]) for number in range(60)])
    path = str(tmp_path / "rows.jsonl")
    assert data.HUB_CARDS not in data.run(context, spec).values
    monkeypatch.setattr(data, "addresses", lambda recipe: [path, "hub:a/b:test", "hub:c/d"])
    told = {"a/b": HubCard("c0ffee", "mit"), "c/d": HubCard(why="no such repository")}
    monkeypatch.setattr("corpus.hub.hub_card", told.__getitem__)
    assert data.run(context, spec).values[data.HUB_CARDS] == {
        "hub:a/b:test": {"commit": "c0ffee", "licence": "mit"},
        "hub:c/d": {"commit": None, "licence": None},
    }
    said = capfd.readouterr().err
    assert "the Hub tells neither commit nor licence of hub:c/d (no such repository)." in said
    assert "of hub:a/b" not in said
