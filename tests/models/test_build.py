import json
import logging
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, OPTConfig

from corpus.problems import UsageProblem
from models.build import (
    TinyLlamaSettings,
    check_causal_lm,
    context_length,
    load_causal_lm,
    load_tokenizer,
    match_vocabulary,
    set_residual_dropout,
    tiny_llama,
)
from models.export import export_causal_lm
from models.forward import PolicyModel, response_logprobs

TOKENS = torch.tensor([[5, 9, 17, 21, 8]])


@pytest.fixture
def directory(tmp_path, llama, tokenizer):
    export_causal_lm(tmp_path / "lm", llama, dict(llama.named_parameters()), tokenizer, max_new_tokens=8)
    return tmp_path / "lm"


def test_the_default_shape_is_the_prototype_s():
    model = tiny_llama(TinyLlamaSettings(), 246, pad_id=0, bos_id=None, eos_id=1, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 523_904
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.rope_parameters["rope_theta"] == 100.0
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.08, rel=0.05)
    assert context_length(model.config) == TinyLlamaSettings().context_length


def test_the_seed_decides_the_weights_and_the_caller_s_random_state_is_left_alone():
    def first_weight(seed: int) -> torch.Tensor:
        return tiny_llama(TinyLlamaSettings(), 50, 0, None, 1, seed).model.layers[0].mlp.up_proj.weight

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert first_weight(0).equal(first_weight(0))
    assert not first_weight(0).equal(first_weight(1))
    assert torch.rand(1) == expected


def test_pad_that_is_eos_and_impossible_shapes_are_refused():
    with pytest.raises(UsageProblem, match="PAD and EOS"):
        tiny_llama(TinyLlamaSettings(), 50, pad_id=1, bos_id=None, eos_id=1, seed=0)
    with pytest.raises(ValidationError, match="heads"):
        TinyLlamaSettings(hidden_size=30, heads=4)
    with pytest.raises(ValidationError, match="key_value_heads"):
        TinyLlamaSettings(heads=4, key_value_heads=3)


def test_an_exported_model_loads_in_the_asked_dtype(directory, llama):
    assert load_causal_lm(str(directory))(TOKENS).logits.equal(llama(TOKENS).logits)
    assert load_causal_lm(str(directory), torch.bfloat16).dtype == torch.bfloat16


def test_a_missing_directory_is_a_usage_problem(tmp_path):
    with pytest.raises(UsageProblem, match="does not exist"):
        load_causal_lm(str(tmp_path / "nothing"))
    with pytest.raises(UsageProblem, match="does not exist"):
        load_tokenizer(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "damage", ["truncated", "no weights", "pickle only", "unknown type", "broken config", "wrong field"]
)
def test_a_damaged_checkpoint_is_a_usage_problem_of_one_line(directory, damage):
    weights, config = directory / "model.safetensors", directory / "config.json"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "no weights":
            weights.unlink()
        case "pickle only":
            torch.save(load_file(weights), directory / "pytorch_model.bin")
            weights.unlink()
        case "unknown type":
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "never-heard-of"}))
        case "broken config":
            config.write_text("{")
        case "wrong field":
            config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": "x"}))
    with pytest.raises(UsageProblem, match="does not load") as problem:
        load_causal_lm(str(directory))
    assert "\n" not in str(problem.value)


def test_a_directory_without_a_tokenizer_is_told_of_in_a_whole_sentence(directory):
    load_tokenizer(str(directory))
    for path in directory.glob("*token*"):
        path.unlink()
    with pytest.raises(UsageProblem, match=r"does not load, and has no tokenizer\.json: ") as problem:
        load_tokenizer(str(directory))
    assert "\n" not in str(problem.value)
    assert not str(problem.value).endswith(":")


def test_what_the_hub_library_warns_of_is_told_once():
    library = logging.getLogger("huggingface_hub")
    assert library.propagate, "so that the root's handler writes it"
    assert not library.handlers, "which would write it too"


def test_a_type_whose_reward_model_could_not_be_saved_is_refused(directory):
    check_causal_lm(str(directory), 64)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "granite"}))
    with pytest.raises(UsageProblem, match="granite, for which Transformers has no sequence classifier"):
        check_causal_lm(str(directory), 64)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_numbers(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageProblem, match="lacks 1 of the weights that AutoModelForCausalLM needs"):
        load_causal_lm(str(directory))


def test_a_checkpoint_of_another_shape_is_a_usage_problem(directory):
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageProblem):
        load_causal_lm(str(directory))


def test_no_code_of_a_checkpoint_is_run(directory):
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Model")}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageProblem):
        load_causal_lm(str(directory))
    assert not (directory / "ran").exists()


def test_a_saved_tokenizer_loads_and_pads_on_the_right(directory, tokenizer):
    loaded = load_tokenizer(str(directory))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "right"


def rewrite_tokenizer(directory, **changes):
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_tokenizer_that_pads_with_eos_is_refused_unless_another_pad_is_named(directory):
    rewrite_tokenizer(directory, pad_token="<eos>")
    with pytest.raises(UsageProblem, match="pads with its EOS"):
        load_tokenizer(str(directory))
    assert load_tokenizer(str(directory), pad_token="<unk>").pad_token_id == 2


def test_an_added_pad_row_is_the_same_whatever_was_drawn_before(directory, llama):
    rewrite_tokenizer(directory, pad_token=None)
    tokenizer = load_tokenizer(str(directory), pad_token="<another>")
    rows = []
    for seed in (1, 2):
        model = load_causal_lm(str(directory))
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        match_vocabulary(model, tokenizer)
        assert torch.random.get_rng_state().equal(before)
        rows.append(model.get_input_embeddings().weight[tokenizer.pad_token_id].clone())
    assert rows[0].equal(rows[1])


def test_a_tokenizer_without_eos_is_refused(directory):
    rewrite_tokenizer(directory, eos_token=None)
    with pytest.raises(UsageProblem, match="no EOS"):
        load_tokenizer(str(directory))


def test_a_broken_tokenizer_is_a_usage_problem(directory):
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(UsageProblem, match="does not load"):
        load_tokenizer(str(directory))


def test_a_missing_pad_token_is_added_and_the_model_grows_by_its_row_without_changing_real_tokens(directory, llama):
    rewrite_tokenizer(directory, pad_token=None)
    tokenizer = load_tokenizer(str(directory))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 50)
    before = llama(TOKENS).logits
    match_vocabulary(llama, tokenizer)
    assert llama.get_input_embeddings().weight.shape[0] == 51
    assert llama.config.pad_token_id == 50
    torch.testing.assert_close(llama(TOKENS).logits[..., :50], before)


def test_a_tokenizer_of_another_model_is_refused_and_a_padded_vocabulary_is_not(directory, tokenizer):
    small = tiny_llama(TinyLlamaSettings(), 40, 0, None, 1, 0)
    with pytest.raises(UsageProblem, match="50 tokens"):
        match_vocabulary(small, tokenizer)
    large = tiny_llama(TinyLlamaSettings(), 64, 0, None, 1, 0)
    match_vocabulary(large, tokenizer)
    assert large.get_input_embeddings().weight.shape[0] == 64


def test_residual_dropout_acts_in_training_only_and_can_be_taken_off(llama):
    plain = llama(TOKENS).logits
    set_residual_dropout(llama, 0.2)
    assert llama.eval()(TOKENS).logits.equal(plain)
    torch.manual_seed(0)
    first, second = llama.train()(TOKENS).logits, llama(TOKENS).logits
    assert not first.equal(plain)
    assert not first.equal(second)
    set_residual_dropout(llama, 0.0)
    assert llama.train()(TOKENS).logits.equal(plain)


def test_it_zeroes_that_share_of_what_each_block_adds_and_keeps_its_mean(llama):
    set_residual_dropout(llama, 0.2)
    outputs = []
    for layer in llama.model.layers:
        layer.mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
        layer.self_attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    torch.manual_seed(0)
    llama.train()(torch.randint(3, 50, (16, 60)))
    assert len(outputs) == 4
    for output in outputs:
        assert output.eq(0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_setting_it_twice_does_not_drop_twice(llama):
    set_residual_dropout(llama, 0.5)
    set_residual_dropout(llama, 0.2)
    outputs = []
    llama.model.layers[0].mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
    llama.train()(torch.randint(3, 50, (16, 60)))
    assert outputs[0].eq(0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_dropout_is_the_same_when_activations_are_recomputed(llama):
    set_residual_dropout(llama, 0.2)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llama.zero_grad()
        torch.manual_seed(1)
        ones = torch.ones_like(TOKENS)
        response_logprobs(PolicyModel(llama).train(), TOKENS, ones, ones).sum().backward()
        gradients.append(llama.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50),
        OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=50),
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50, hidden_dropout=0.1, attention_dropout=0.1),
    ],
)
def test_zero_turns_an_architecture_s_own_dropout_off_while_training(config):
    model = AutoModelForCausalLM.from_config(config).train()
    set_residual_dropout(model, 0.0)
    assert model(TOKENS).logits.equal(model.eval()(TOKENS).logits)


def test_residual_dropout_on_blocks_that_are_not_known_is_refused():
    model = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(UsageProblem, match="BloomForCausalLM"):
        set_residual_dropout(model, 0.2)


def test_a_copy_of_a_directory_loads_from_anywhere(directory, tmp_path, llama):
    shutil.move(directory, tmp_path / "moved")
    assert load_causal_lm(str(tmp_path / "moved"))(TOKENS).logits.equal(llama(TOKENS).logits)
