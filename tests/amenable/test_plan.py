"""`amenable plan`: what it says, what it refuses, and how near it comes to runs that were measured."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amenable.cli import app
from amenable.plan import WORLD_WORDS, planned
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from cluster.calibration import measured
from cluster.ppo_time import Constants
from corpus.problems import UsageProblem
from learners.metrics import read_metrics

RECORDED = Path(__file__).parents[1] / "cluster" / "recorded"
"""The demo and tests/end_to_end/tiny.yaml as they ran on two shared cores of an AMD EPYC: their metrics, cut down to
what a plan reads."""

PAPER = ["paper", "--model", "gpt3-1.3b"]


def command(*words: str):
    return CliRunner().invoke(app, ["plan", *words])


def recipe_of(name: str) -> Recipe:
    return load_recipe(RECORDED / name / "recipe.yaml", [], Recipe)


def update_of(name: str):
    recipe = recipe_of(name)
    lines = read_metrics(RECORDED / name / "round-01" / "ppo" / "metrics.jsonl")
    return measured(lines, recipe.ppo.batch_size, recipe.sampling.max_response_tokens)


def test_a_plan_names_roles_bundles_memory_time_and_cost_with_formulas_and_assumptions():
    ended = command(*PAPER)
    assert ended.exit_code == 0, ended.output
    for said in (
        "learners    8          1 CPU + 1 GPU   h100-80gb",
        "generators  4",
        "reference   1",
        "moments",
        "Tensor parallelism 1 of each generator; the lowest that fits: 1.",
        "GPU-hours",
        "episodes/s",
        "Formulas:",
        "Assumptions:",
        "4 USD an hour (assumed",
        "train share 0.35",
    ):
        assert said in ended.stdout, said


def test_the_answer_is_the_same_plan_as_json():
    content = json.loads(command(*PAPER, "--json").stdout)
    plan = content["plan"]
    roles = {role["role"]: role for role in plan["roles"]}
    assert roles["learners"]["bundle"] == {"CPU": 1.0, "GPU": 1.0}
    assert roles["learners"]["gpu_hours"] == pytest.approx(8 * plan["hours"])
    assert plan["gpu_hours"] == pytest.approx(sum(role["gpu_hours"] for role in plan["roles"]))
    assert plan["cost_usd"] == pytest.approx(4.0 * plan["gpu_hours"])
    assert plan["hours"] == pytest.approx(500 * plan["update"]["update_s"] / 3600)
    assert plan["episodes_per_s"] == pytest.approx(512 / plan["update"]["update_s"])
    assert plan["fits"]
    assert content["formulas"]


def test_generators_so_that_neither_waits_are_just_enough():
    fewest = json.loads(command(*PAPER, "ppo.max_staleness=1", "--json").stdout)["plan"][
        "generators_so_that_neither_waits"
    ]

    def waits(generators: int) -> float:
        found = command(*PAPER, "ppo.max_staleness=1", f"rollouts.generators={generators}", "--json")
        return json.loads(found.stdout)["plan"]["update"]["learner_waits_s"]

    assert waits(fewest) == 0
    assert waits(fewest - 1) > 0


def test_what_does_not_fit_is_told_with_what_would_help():
    told = command("paper", "--model", "gpt3-6.7b", "--hardware", "l4-24gb").stdout
    assert "TOO LITTLE" in told
    assert "learners: a process is reckoned to need" in told
    assert "generators: a process is reckoned to need" in told
    assert "tensor parallelism 2 fits (rollouts.tensor_parallel=2 rollouts.gpus=2)" in told
    stage = command("paper", "--model", "llama-3.1-8b", "learners.engine.zero_stage=0", "learners.workers=16").stdout
    assert "ZeRO stage 3 fits (learners.engine.zero_stage=3)" in stage


def test_a_second_gpu_of_a_generator_stands_idle_unless_its_model_is_divided():
    told = command(*PAPER, "rollouts.gpus=2").stdout
    assert (
        "rollouts.gpus 2: a generator uses as many GPUs as rollouts.tensor_parallel says, 1; the others would" in told
    )
    assert "stand idle" not in command(*PAPER, "rollouts.gpus=2", "rollouts.tensor_parallel=2").stdout
    assert "stand idle" in command(*PAPER, "learners.gpus=2").stdout


def test_a_policy_too_large_for_one_device_is_planned_over_as_few_as_hold_it():
    large = ["paper", "--model", "gpt3-175b", "--hardware", "h200-141gb", "--json"]
    plan = json.loads(command(*large).stdout)["plan"]
    roles = {role["role"]: role for role in plan["roles"]}
    assert not roles["generators"]["fits"]
    fewest = plan["lowest_tensor_parallel_that_fits"]
    assert fewest == 3  # 350 GB of weights in bfloat16 and 20 GiB of keys and values on 141 GB each

    def divided(ranks: int) -> dict:
        words = [f"rollouts.tensor_parallel={ranks}", f"rollouts.gpus={ranks}"]
        return json.loads(command(*large, *words).stdout)["plan"]

    for ranks, fits in ((fewest, True), (fewest - 1, False)):
        role = {each["role"]: each for each in divided(ranks)["roles"]}["generators"]
        assert role["fits"] == fits
        assert role["bundle"] == {"CPU": 1.0, "GPU": float(ranks)}
        assert role["gpu_hours"] == pytest.approx(4 * ranks * divided(ranks)["hours"])
    assert divided(8)["update"]["generate_s"] < divided(4)["update"]["generate_s"]
    assert "Tensor parallelism 3 would fit too (the recipe has 8)." in divided(8)["remarks"]
    assert any(said.startswith("rollouts.tensor_parallel 5 cannot be: its 96") for said in divided(5)["remarks"])


def test_a_persons_price_counts(tmp_path):
    file = tmp_path / "ours.yaml"
    file.write_text(
        "{kind: gpu, memory_gib: 79, bf16_tflops: 989.4, fp32_tflops: 66.9, bandwidth_gb_per_s: 3350, "
        "devices_per_node: 8, price_usd_per_hour: 1.0}"
    )
    ours, table = (
        json.loads(command(*PAPER, "--json", *words).stdout)["plan"]["cost_usd"]
        for words in (["--hardware", str(file)], [])
    )
    assert table == pytest.approx(4 * ours)


def test_a_limit_of_gpu_hours_is_told_in_updates():
    hours = json.loads(command(*PAPER, "--json").stdout)["plan"]["gpu_hours"]
    assert "would end PPO after 250 updates" in command(*PAPER, f"limits.gpu_hours={hours / 2 + 0.01}").stdout
    assert "would end PPO" not in command(*PAPER, f"limits.gpu_hours={2 * hours}").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["paper", "--hardware", "cpu-core"], "the recipe asks for GPUs"),
        (["paper", "--hardware", "abacus"], "There is no hardware 'abacus'"),
        (["demo", "--from", "no-such-run"], "There is no run in no-such-run"),
        (["demo", "--model", "./no-such-model"], "does not exist"),
        (["demo", "ppo.clap=1"], "clap"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_exit_code_2(words, says):
    ended = command(*words)
    assert ended.exit_code == 2
    assert says in ended.stderr


# against measured runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_the_constants_of_a_run_give_its_own_update_back(name):
    found = planned(recipe_of(name), str(RECORDED / name), None, None)
    assert found.calibration is not None
    assert abs(found.calibration.error_after) < 0.1
    assert abs(found.calibration.error_before) > 2 * abs(found.calibration.error_after)
    assert found.plan.update.train_s == pytest.approx(update_of(name).train_s, rel=0.05)


@pytest.mark.parametrize(("by", "of"), [("demo", "tiny"), ("tiny", "demo")])
def test_a_run_is_predicted_by_the_constants_of_another_one(by, of):
    """Left out of the calibration, and told within a half (measured: 40 % and 38 % too long). The networks differ by a
    factor of 4, the FLOP of an update by 20, and the machine was shared with other work both times."""
    told = planned(recipe_of(of), str(RECORDED / by), None, None).plan.update
    was = update_of(of)
    assert abs(told.update_s / was.update_s - 1) < 0.5


def test_the_wrong_run_would_not_pass_for_a_prediction():
    """The demo's own seconds, taken for the small run's, are far out: the plan must have scaled them."""
    assert update_of("demo").update_s / update_of("tiny").update_s - 1 > 2


def test_a_run_with_too_few_updates_cannot_calibrate(tmp_path):
    run = tmp_path / "short"
    shutil.copytree(RECORDED / "tiny", run)
    metrics = run / "round-01" / "ppo" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UsageProblem, match="has 2 PPO updates"):
        planned(recipe_of("tiny"), str(run), None, None)
    metrics.unlink()
    with pytest.raises(UsageProblem, match="no metrics of PPO yet"):
        planned(recipe_of("tiny"), str(run), None, None)


def test_a_run_whose_generators_work_beside_the_learner_says_nothing_of_engine_steps(tmp_path):
    run = tmp_path / "beside"
    shutil.copytree(RECORDED / "tiny", run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ppo:\n", "ppo:\n  max_staleness: 1\n"))
    beside = planned(load_recipe(recipe, [], Recipe), str(run), None, None).constants
    turns = planned(recipe_of("tiny"), str(RECORDED / "tiny"), None, None).constants
    assert beside.engine_step_s == Constants().engine_step_s != turns.engine_step_s
    assert beside.train_share == turns.train_share


def test_the_command_states_the_error_against_the_run():
    told = command("demo", "--from", str(RECORDED / "demo")).stdout
    assert "A plan of it with the assumptions is off by" in told
    assert "engine step s 0.0" in told
    assert "(measured)" in told


def test_the_built_in_world_has_as_many_words_as_plans_reckon_with():
    config = json.loads((RECORDED / "tiny" / "round-01" / "ppo-init" / "export" / "config.json").read_text())
    assert config["vocab_size"] == WORLD_WORDS
