"""Which model each stage takes from the one before, as the paper has it: no error tells where one takes another's."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from amenable.pipeline import stages_of
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import StageSpec
from amenable.stages import evaluation, ppo, reward_model
from amenable.stages.context import Context
from corpus.schemas import make_table, write_table

REWARDS = {"epoch-1": [0.1, 0.3], "epoch-2": [2.0, 0.0], "epoch-3": [0.6, 0.7]}
"""Of the two validation prompts; the second epoch's mean is the best, the third's worst answer is."""


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A run of three SFT epochs, and two of four validation prompts to select by."""
    recipe = Recipe.model_validate({"name": "w", "run_directory": tmp_path, "select_sft": {"prompts": 2}})
    run = RunDirectory(recipe.run_directory)
    context = Context(recipe, run, Progress(json=True), None)  # type: ignore[arg-type]
    run.data.mkdir()
    run.sft.mkdir(parents=True)
    four = {
        name: [f"{name} {number}" for number in range(4)] for name in ("prompt_id", "user_id", "prompt", "response")
    }
    tokens = {"prompt_tokens": [[5]] * 4, "response_tokens": [[6]] * 4}
    table = make_table("demonstrations", {**four, **tokens, "meta": [""] * 4})
    write_table(table, context.data("demonstrations-valid"), "demonstrations")
    exports = [{"directory": name, "valid_loss": loss} for name, loss in zip(REWARDS, (1.0, 2.0, 3.0), strict=True)]
    monkeypatch.setattr(Context, "values", lambda self, stage: {"exports": exports})
    return context


@pytest.fixture
def selected(context: Context, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """select-sft has run, with engines that answer what tells their weights; what they were loaded with, in order."""
    loaded: list[str] = []

    def sample(context: Context, prompts: pa.Table, samples: int, *rest: object) -> pa.Table:
        assert samples == 1
        ids = prompts["prompt_id"].to_pylist()
        assert ids == ["prompt_id 0", "prompt_id 1"]
        return pa.table({"prompt_id": ids, "by": [Path(loaded[-1]).name] * len(ids)})

    monkeypatch.setattr(reward_model, "start_actors", lambda context: None)
    monkeypatch.setattr(reward_model, "load_reward", lambda context: None)
    monkeypatch.setattr(reward_model, "load_into_generators", lambda context, directory, name: loaded.append(directory))
    monkeypatch.setattr(reward_model, "sample", sample)
    monkeypatch.setattr(reward_model, "reward_scores", lambda context, samples: REWARDS[samples["by"][0].as_py()])
    spec = StageSpec("select-sft", context.round.select_sft, {})
    spec.directory.mkdir(parents=True)
    reward_model.run_select_sft(context, spec)
    return loaded


def test_the_sft_baseline_is_the_epoch_with_the_best_mean_reward_not_the_best_loss(context, selected):
    assert selected == [str(context.run.sft / name) for name in REWARDS]
    said = json.loads((context.round.select_sft / "selection.json").read_text())
    assert (said["selected"], said["reward"]) == ("epoch-2", 1.0)
    assert [each["reward"] for each in said["epochs"]] == pytest.approx([0.2, 1.0, 0.65])
    assert reward_model.selected_sft(context) == str(context.run.sft / "epoch-2")


def test_the_evaluation_compares_base_the_selected_sft_ppo_init_and_the_ema_policy(context, selected, monkeypatch):
    monkeypatch.setattr(Context, "base_model", lambda self: "the base model")
    first = context.run.root / "round-01"
    assert evaluation.models(context) == {
        "base": "the base model",
        "sft": str(context.run.sft / "epoch-2"),
        "ppo-init": str(first / "ppo-init" / "export"),
        "ppo": str(first / "ppo" / "ema"),
    }


def test_the_value_network_starts_from_the_runs_reward_model(context):
    assert ppo.value_start(context) == str(context.run.root / "round-01" / "rm" / "export")


def reads_of(tmp_path: Path, given: dict) -> dict[str, dict]:
    recipe = Recipe.model_validate({"name": "w", "run_directory": tmp_path, **given})
    return {stage.name: stage.spec.reads for stage in stages_of(recipe, RunDirectory(tmp_path), {})}


@pytest.mark.parametrize(
    "given",
    [
        {"learners": {"workers": 2}},
        {"learners": {"engine": {"zero_stage": 3, "activation_checkpointing": True, "tokens_per_microbatch": 64}}},
        {"sft": {"checkpoint_seconds": 1.0}, "rm": {"checkpoint_seconds": 1.0}},
        {"ppo": {"checkpoint_every": 1, "checkpoints_kept": 5, "lease_s": 1.0, "batch_deadline_s": 9.0}},
        {"ppo": {"straggler_bound_s": 60.0, "mismatch_bound_nats": 1.0, "min_effective_sample_size": 0.2}},
    ],
    ids=["ranks", "engine", "when supervised stages save", "when PPO saves and gives up", "bounds that are moved"],
)
def test_a_run_goes_on_where_nothing_of_what_is_learned_has_changed(tmp_path, given):
    assert reads_of(tmp_path, given) == reads_of(tmp_path, {})


def test_a_run_goes_on_where_a_reward_service_is_given_more_time_or_another_token(tmp_path):
    service = {"kind": "http", "url": "http://scores/"}
    patient = service | {"timeout_s": 60.0, "deadline_s": 3600.0, "token_variable": "SCORES_TOKEN"}
    assert reads_of(tmp_path, {"reward": patient}) == reads_of(tmp_path, {"reward": service})


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"learners": {"engine": {"dtype": "bfloat16"}}}, {"base", "sft", "rm", "ppo-init", "ppo"}),
        ({"sft": {"residual_dropout": 0.1}}, {"sft"}),
        ({"ppo": {"clip": 0.1}}, {"ppo"}),
        ({"ppo": {"policy": {"peak_lr": 1e-6}}}, {"ppo"}),
        ({"reward": {"kind": "http", "url": "http://scores/"}}, {"select-sft", "ppo", "eval"}),
    ],
)
def test_what_changes_what_is_learned_is_read(tmp_path, given, changed):
    before, after = reads_of(tmp_path, {}), reads_of(tmp_path, given)
    assert {name for name in before if before[name] != after[name]} == changed
