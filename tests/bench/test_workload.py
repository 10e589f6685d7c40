from pathlib import Path

import pytest
import torch

from amenable.early_checks import check_early
from amenable.pipeline import stages_of
from amenable.run_directory import RunDirectory
from amenable.stage_reuse import done
from bench.workload import EOS, FIRST_WORD, PAD, WORKLOADS, Options, fabricate, recipe_for, set_ending_probability
from corpus.schemas import read_table
from models.build import tiny_llama
from models.settings import TinyLlamaSettings

OPTIONS = Options(ptx=True, staleness=1, dtype="float32", threads=1, updates=5, warm_up=2)
SMALL = TinyLlamaSettings(hidden_size=32, layers=1, heads=2, mlp_size=32, initial_std=0.02)


def ending_probabilities(probability: float) -> torch.Tensor:
    model = tiny_llama(SMALL, 256, PAD, None, EOS, seed=1)
    set_ending_probability(model, probability, seed=2)
    tokens = torch.randint(FIRST_WORD, 256, (32, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits.softmax(-1)[..., EOS]


def test_responses_end_with_the_same_chance_after_any_text():
    found = ending_probabilities(1 / 32)
    assert found.mean() == pytest.approx(1 / 32, rel=0.1)
    assert found.max() < 2 / 32
    assert found.min() > 0.5 / 32


def test_responses_of_full_length_never_end():
    assert ending_probabilities(0.0).max() < 1e-9


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    recipe = recipe_for(WORKLOADS["A"], OPTIONS, directory)
    return recipe, fabricate(WORKLOADS["A"], recipe, directory)


def test_the_model_has_the_size_that_is_stated(fabricated):
    assert fabricated[1] == 3_688_704


def test_ppo_is_the_one_stage_left_to_run(fabricated):
    recipe, _ = fabricated
    check_early(recipe)  # the command asks the same before it begins
    left = [stage.name for stage in stages_of(recipe, RunDirectory(recipe.run_directory)) if not done_or_late(stage)]
    assert left[0] == "ppo"


def done_or_late(stage) -> bool:
    """Whether the stage counts as done; one whose parents are not is not asked."""
    from corpus.problems import RunProblem

    try:
        return bool(done(stage.spec))
    except RunProblem:
        return False


def test_prompts_fill_workload_a(fabricated):
    recipe, _ = fabricated
    table = read_table(Path(recipe.run_directory) / "data" / "prompts-ppo.parquet", "prompts")
    assert {len(tokens) for tokens in table["prompt_tokens"].to_pylist()} == {32}
    assert recipe.tokens.context_tokens == 64


def test_options_reach_the_recipe(fabricated):
    recipe, _ = fabricated
    assert recipe.ppo.max_staleness == 1
    assert recipe.ppo.ptx_coefficient == 27.8
    without = recipe_for(WORKLOADS["B"], Options(False, 0, "bfloat16", 2, 5, 2), Path("/nowhere"))
    assert without.ppo.ptx_coefficient == 0
    assert {without.learners.engine.dtype, without.rollouts.dtype, without.scoring.dtype} == {"bfloat16"}
    # Where responses end one by one, generator and scoring work side by side; where they end together, in turns.
    assert (without.learners.threads, without.rollouts.threads, without.scoring.threads) == (2, 1, 1)
    in_turns = recipe_for(WORKLOADS["A"], Options(False, 0, "bfloat16", 2, 5, 2), Path("/nowhere"))
    assert (in_turns.learners.threads, in_turns.rollouts.threads, in_turns.scoring.threads) == (2, 2, 2)
