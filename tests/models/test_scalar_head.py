import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    OPTConfig,
)

from corpus.problems import UsageProblem
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel, last_token_scores, load_scalar

TOKENS = torch.tensor([[5, 9, 17, 21, 1, 0, 0], [5, 9, 17, 21, 8, 33, 1]])
ATTENTION = (TOKENS != 0).long()


@pytest.fixture
def directory(tmp_path, llama, tokenizer):
    export_causal_lm(tmp_path / "lm", llama, dict(llama.named_parameters()), tokenizer, max_new_tokens=8)
    return tmp_path / "lm"


@pytest.fixture
def reward_model(directory):
    model = ScalarHeadModel.from_causal_lm(str(directory), seed=3)
    with torch.no_grad():
        model.head.bias.fill_(0.25)
    return model


def test_the_backbone_is_the_language_model_s_and_the_head_is_new(directory, llama):
    model = ScalarHeadModel.from_causal_lm(str(directory), seed=3)
    for name, weight in llama.model.state_dict().items():
        assert model.backbone.state_dict()[name].equal(weight)
    assert model.head.bias.item() == 0.0
    assert ScalarHeadModel.from_causal_lm(str(directory), seed=3).head.weight.equal(model.head.weight)
    assert not ScalarHeadModel.from_causal_lm(str(directory), seed=4).head.weight.equal(model.head.weight)


def test_head_weights_have_the_standard_deviation_of_ziegler_s_code():
    config = GPT2Config(n_embd=4096, n_layer=1, n_head=2, n_positions=8, vocab_size=8, n_inner=8)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config).transformer
    backbone.config = config
    assert ScalarHeadModel(backbone, seed=0).head.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)


def test_the_score_is_read_at_the_last_real_token_left_or_right_padded(reward_model):
    values = reward_model(TOKENS, ATTENTION)
    assert values.dtype == torch.float32
    assert values[0, 5:].eq(0).all()
    assert last_token_scores(values, ATTENTION).tolist() == [values[0, 4].item(), values[1, 6].item()]
    left = torch.tensor([[0, 0, 5, 9, 17, 21, 1]])
    left_score = last_token_scores(reward_model(left, left != 0), left != 0)
    torch.testing.assert_close(left_score, values[:1, 4], atol=2e-5, rtol=1e-5)
    assert values[0, -1] != values[0, 4]


def test_a_saved_reward_model_is_a_sequence_classifier_but_for_its_bias(reward_model, tokenizer, tmp_path):
    reward_model.save_reward_model(tmp_path / "rm", tokenizer, bias=-1.0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert isinstance(classifier, LlamaForSequenceClassification)
    assert classifier.config.reward_bias == -0.75
    assert classifier.config.num_labels == 1
    scores = last_token_scores(reward_model(TOKENS, ATTENTION), ATTENTION) - 1.0
    theirs = classifier(TOKENS, attention_mask=ATTENTION).logits[:, 0] + classifier.config.reward_bias
    torch.testing.assert_close(theirs, scores, atol=1e-5, rtol=1e-5)


def test_a_saved_value_model_is_a_token_classifier_bias_included(reward_model, tokenizer, tmp_path):
    reward_model.save_value_model(tmp_path / "value", tokenizer)
    classifier = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    assert isinstance(classifier, LlamaForTokenClassification)
    theirs = classifier(TOKENS, attention_mask=ATTENTION).logits[..., 0]
    values = reward_model(TOKENS, ATTENTION)
    torch.testing.assert_close(theirs[ATTENTION.bool()], values[ATTENTION.bool()], atol=1e-5, rtol=1e-5)
    classifier.train()
    assert classifier(TOKENS, attention_mask=ATTENTION).logits[..., 0].equal(theirs)


def test_either_loads_again_with_its_whole_bias(reward_model, tokenizer, tmp_path):
    reward_model.save_reward_model(tmp_path / "rm", tokenizer, bias=-1.0)
    reward_model.save_value_model(tmp_path / "value", tokenizer)
    values = reward_model(TOKENS, ATTENTION)
    again = load_scalar(str(tmp_path / "rm"))
    assert again.head.bias.item() == -0.75
    torch.testing.assert_close(again(TOKENS, ATTENTION), torch.where(ATTENTION.bool(), values - 1.0, 0.0))
    torch.testing.assert_close(load_scalar(str(tmp_path / "value"))(TOKENS, ATTENTION), values)


def test_weights_gathered_elsewhere_are_saved_in_place_of_the_module_s_own(reward_model, tokenizer, tmp_path):
    gathered = {name: torch.full_like(weight, 0.5) for name, weight in reward_model.named_parameters()}
    reward_model.save_value_model(tmp_path / "value", tokenizer, gathered)
    loaded = dict(load_scalar(str(tmp_path / "value")).named_parameters())
    assert loaded.keys() == gathered.keys()
    assert all(loaded[name].equal(gathered[name]) for name in gathered)
    assert "head.bias" in gathered  # the caller's mapping is left as it was


def test_a_sequence_classifier_of_another_origin_loads_with_bias_zero(reward_model, tokenizer, tmp_path):
    reward_model.save_reward_model(tmp_path / "rm", tokenizer)
    path = tmp_path / "rm" / "config.json"
    config = json.loads(path.read_text())
    del config["reward_bias"]
    path.write_text(json.dumps(config))
    assert load_scalar(str(tmp_path / "rm")).head.bias.item() == 0.0


def test_a_classifier_of_several_labels_and_a_language_model_are_refused(directory, reward_model, tokenizer, tmp_path):
    with pytest.raises(UsageProblem, match="LlamaForCausalLM"):
        load_scalar(str(directory))
    config = reward_model.config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(UsageProblem, match="3 numbers"):
        load_scalar(str(tmp_path / "three"))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50, pad_token_id=0),
        GPTNeoXConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=50,
            pad_token_id=0,
        ),
        # Transformers has no token classifier for it: its value model is a sequence classifier.
        OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=50,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
            pad_token_id=0,
        ),
    ],
    ids=["gpt2", "gpt_neox", "opt"],
)
def test_other_architectures_make_the_same_journey(config, tokenizer, tmp_path):
    language_model = AutoModelForCausalLM.from_config(config)
    export_causal_lm(tmp_path / "lm", language_model, dict(language_model.named_parameters()), tokenizer, 8)
    model = ScalarHeadModel.from_causal_lm(str(tmp_path / "lm"), seed=0).eval()
    values = model(TOKENS, ATTENTION)
    model.save_reward_model(tmp_path / "rm", tokenizer, bias=2.0)
    model.save_value_model(tmp_path / "value", tokenizer)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    theirs = classifier(TOKENS, attention_mask=ATTENTION).logits[:, 0] + classifier.config.reward_bias
    torch.testing.assert_close(theirs, last_token_scores(values, ATTENTION) + 2.0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_scalar(str(tmp_path / "value")).eval()(TOKENS, ATTENTION), values)


VLLM_PROGRAM = """
import json, sys
from vllm import LLM, PoolingParams
engine = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64,
             kv_cache_memory_bytes=1 << 26)
task = sys.argv[2]
outputs = engine.encode([{"prompt_token_ids": tokens} for tokens in json.loads(sys.argv[3])],
                        pooling_params=PoolingParams(task=task, use_activation=False), pooling_task=task)
with open(sys.argv[4], "w") as file:
    json.dump([output.outputs.data.flatten().tolist() for output in outputs], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("reward", "classify"), ("value", "token_classify")])
def test_vllm_loads_both_exports_untouched_and_gives_the_same_numbers(tmp_path, tokenizer, kind, task):
    from models.build import TinyLlamaSettings, tiny_llama

    torch.manual_seed(0)
    llama = tiny_llama(TinyLlamaSettings(), 50, pad_id=0, bos_id=None, eos_id=1, seed=0)
    export_causal_lm(tmp_path / "lm", llama, dict(llama.named_parameters()), tokenizer, max_new_tokens=8)
    model = ScalarHeadModel.from_causal_lm(str(tmp_path / "lm"), seed=3)
    with torch.no_grad():
        model.head.bias.fill_(0.25)
    save = model.save_reward_model if kind == "reward" else model.save_value_model
    save(tmp_path / "model", tokenizer)
    sequences = [[5, 9, 17, 21, 1], [8, 7, 6, 30, 4, 11, 1]]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    answers = tmp_path / "rows.json"
    arguments = [str(tmp_path / "model"), task, json.dumps(sequences), str(answers)]
    program = [sys.executable, "-c", VLLM_PROGRAM, *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for tokens, found in zip(sequences, json.loads(answers.read_text()), strict=True):
        with torch.no_grad():
            values = model(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.long))[0]
        # A reward model's bias is in config.json, which vLLM does not read: it gives the head's product alone.
        expected = values[-1:] - 0.25 if kind == "reward" else values
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
