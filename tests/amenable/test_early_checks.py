"""What is wrong and can be known beforehand is told before anything is started or written."""

import json
from pathlib import Path

import pytest

from amenable.pipeline import check_early, run_pipeline, stages_of
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe, packaged_recipes
from amenable.run_directory import RunDirectory
from amenable.stages.sources import directory_hashes, reward_hashes
from corpus.problems import UsageProblem


def recipe(tmp_path: Path, **settings) -> Recipe:
    return Recipe.model_validate({"name": "early", "run_directory": tmp_path / "run", **settings})


def reads_of(settings: Recipe) -> dict[str, dict]:
    stages = stages_of(settings, RunDirectory(settings.run_directory))
    return {stage.name: stage.spec.reads for stage in stages}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tiny causal language model and its tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from models.build import tiny_llama
    from models.export import export_causal_lm
    from models.settings import TinyLlamaSettings

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    shape = TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=4096)
    network = tiny_llama(shape, len(words), pad_id=0, bos_id=None, eos_id=1, seed=0)
    export_causal_lm(tmp_path / "model", network, dict(network.named_parameters()), tokenizer, max_new_tokens=8)
    return tmp_path / "model"


def test_packaged_recipes_pass_but_for_the_data_they_ask_for(tmp_path):
    for one in packaged_recipes():
        settings = load_recipe(one.name, [f"run_directory={json.dumps(str(tmp_path / one.name))}"], Recipe)
        check_early(settings.model_copy(update={"corpus": None}))


@pytest.mark.parametrize("stage", ["sft", "ppo_init"])
def test_a_context_shorter_than_a_demonstration_may_be_is_refused(tmp_path, stage):
    tokens = {"max_prompt_tokens": 40, "max_response_tokens": 32, "context_tokens": 72}
    short = recipe(tmp_path, tokens=tokens, sampling={"max_response_tokens": 24}, **{stage: {"context_length": 71}})
    with pytest.raises(UsageProblem, match=rf"{stage}.context_length 71 is less than .* 72"):
        check_early(short)
    check_early(
        recipe(tmp_path, tokens=tokens, sampling={"max_response_tokens": 24}, **{stage: {"context_length": 72}})
    )


def test_a_corpus_that_is_not_there_is_told_before_the_run_has_a_directory(tmp_path):
    missing = recipe(tmp_path, corpus={"path": str(tmp_path / "nothing.jsonl")})
    with pytest.raises(UsageProblem, match=r"nothing\.jsonl"):
        run_pipeline(missing, until=None, progress=Progress(json=True), address=None)
    assert not (tmp_path / "run").exists()


def test_a_base_model_without_whole_weights_is_told(tmp_path, model):
    base = recipe(tmp_path, model={"base": str(model)})
    check_early(base)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageProblem, match=r"model\.safetensors is damaged"):
        check_early(base)
    weights.unlink()
    with pytest.raises(UsageProblem, match=r"no \.safetensors file"):
        check_early(base)


def test_a_base_model_with_another_context_or_vocabulary_is_told(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    with pytest.raises(UsageProblem, match="reads at most 100 tokens"):
        check_early(recipe(tmp_path, model={"base": str(model)}))
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    with pytest.raises(UsageProblem, match="rows for 3"):
        check_early(recipe(tmp_path, model={"base": str(model)}))


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"kind": "function", "function": "no_such_module:f"}, "cannot be imported"),
        ({"kind": "function", "function": "json:no_such_function"}, "no function no_such_function"),
        ({"kind": "http", "url": "ftp://somewhere"}, "http:// or https://"),
        ({"kind": "huggingface", "model": "./no-such-model"}, "does not exist"),
    ],
)
def test_a_reward_that_cannot_serve_is_told(tmp_path, reward, says):
    with pytest.raises(UsageProblem, match=says):
        check_early(recipe(tmp_path, reward=reward))


def test_a_reward_model_with_two_labels_is_told(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (model / "config.json").write_text(json.dumps({**config, **labels}))
    with pytest.raises(UsageProblem, match="2 numbers; a reward is one"):
        check_early(recipe(tmp_path, reward={"kind": "huggingface", "model": str(model)}))


def test_another_content_of_a_base_model_changes_what_the_data_stage_reads(tmp_path, model):
    base = recipe(tmp_path, model={"base": str(model)})
    before = reads_of(base)["data"]
    assert reads_of(base)["data"] == before
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    assert reads_of(base)["data"] != before
    assert directory_hashes("a/name-on-the-hub") == {}


def test_another_content_of_a_reward_function_changes_what_ppo_reads_and_nothing_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "brevity_of_early.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    rewarded = recipe(tmp_path, reward={"kind": "function", "function": "brevity_of_early:score"})
    assert list(reward_hashes(rewarded.reward)) == ["brevity_of_early.py"]
    before = reads_of(rewarded)
    (tmp_path / "brevity_of_early.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    after = reads_of(rewarded)
    assert {name for name in before if before[name] != after[name]} == {"select-sft", "ppo", "eval"}
