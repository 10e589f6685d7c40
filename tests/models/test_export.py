import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from corpus.problems import RunProblem
from models.build import load_tokenizer
from models.export import export_causal_lm, write_with_row_for_pad
from models.forward import PolicyModel, response_logprobs

TOKENS = torch.tensor([[5, 9, 17, 21, 8]])


def test_transformers_loads_it_untouched(tmp_path, llama, tokenizer):
    export_causal_lm(tmp_path, llama, dict(llama.named_parameters()), tokenizer, max_new_tokens=24)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits.equal(llama(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("w2 w6").input_ids == tokenizer("w2 w6").input_ids
    limits = GenerationConfig.from_pretrained(tmp_path)
    assert (limits.max_new_tokens, limits.eos_token_id, limits.pad_token_id) == (24, 1, 0)


def test_configuration_alone_is_enough_and_is_not_changed(tmp_path, llama, tokenizer):
    llama.config.pad_token_id = None
    export_causal_lm(tmp_path, llama.config, dict(llama.named_parameters()), tokenizer, max_new_tokens=24)
    assert llama.config.pad_token_id is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_tied_weights_are_written_once_whether_both_names_are_given_or_one(tmp_path, llama, tokenizer):
    one = dict(llama.named_parameters())
    both = {name: weight.clone() for name, weight in llama.state_dict().items()}
    assert set(both) - set(one) == {"lm_head.weight"}
    for name, weights in (("one", one), ("both", both)):
        export_causal_lm(tmp_path / name, llama, weights, tokenizer, max_new_tokens=24)
        assert load_file(tmp_path / name / "model.safetensors").keys() == one.keys()


def test_the_weights_given_are_exported_and_not_the_module_s(tmp_path, llama, tokenizer):
    averaged = {name: torch.full_like(weight, 0.5) for name, weight in llama.named_parameters()}
    export_causal_lm(tmp_path, llama, averaged, tokenizer, max_new_tokens=24)
    assert all(weight.eq(0.5).all() for weight in load_file(tmp_path / "model.safetensors").values())


def test_a_dtype_is_written_and_stated(tmp_path, llama, tokenizer):
    export_causal_lm(tmp_path, llama, dict(llama.named_parameters()), tokenizer, 24, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("mistake", ["missing", "unknown", "shape"])
def test_weights_of_another_model_are_refused_before_anything_is_written(tmp_path, llama, tokenizer, mistake):
    weights = dict(llama.named_parameters())
    match mistake:
        case "missing":
            del weights["model.norm.weight"]
        case "unknown":
            weights["causal_lm.model.norm.weight"] = weights["model.norm.weight"]
        case "shape":
            weights["model.norm.weight"] = torch.ones(7)
    with pytest.raises(RunProblem, match=r"model\.norm\.weight"):
        export_causal_lm(tmp_path / "lm", llama, weights, tokenizer, max_new_tokens=24)
    assert not (tmp_path / "lm").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_with_a_row_for_pad_is_the_same_model_and_only_written_where_it_is_needed(tmp_path, tokenizer, tied):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=50, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    export_causal_lm(tmp_path / "lm", model, dict(model.named_parameters()), tokenizer, 8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert not write_with_row_for_pad(str(tmp_path / "lm"), str(tmp_path / "tokenizer"), tmp_path / "padded")
    assert not (tmp_path / "padded").exists()
    more = load_tokenizer(str(tmp_path / "tokenizer"), pad_token="<another>")
    more.save_pretrained(tmp_path / "tokenizer")
    assert write_with_row_for_pad(str(tmp_path / "lm"), str(tmp_path / "tokenizer"), tmp_path / "padded")
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert padded.config.vocab_size == 51
    torch.testing.assert_close(padded(TOKENS).logits[..., :50], model(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "padded").pad_token_id == 50


VLLM_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, generation_config="vllm",
             logprobs_mode="processed_logprobs", kv_cache_memory_bytes=1 << 26)
outputs = engine.generate([{"prompt_token_ids": [5, 9, 17]}, {"prompt_token_ids": [8, 7, 6, 30, 4]}],
                          SamplingParams(temperature=0.7, max_tokens=8, logprobs=0, seed=1))
rows = []
for output in outputs:
    tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    rows.append([list(output.prompt_token_ids), tokens, [step[t].logprob for step, t in zip(steps, tokens)]])
with open(sys.argv[2], "w") as file:
    json.dump(rows, file)
"""


@pytest.mark.slow
def test_vllm_loads_it_untouched_and_gives_the_same_logprobs(tmp_path, tokenizer):
    from models.build import TinyLlamaSettings, tiny_llama

    model = tiny_llama(TinyLlamaSettings(), 50, pad_id=0, bos_id=None, eos_id=1, seed=0)
    export_causal_lm(tmp_path / "lm", model, dict(model.named_parameters()), tokenizer, max_new_tokens=8)
    # Its own process: vLLM changes thread settings of the process that it is in.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    arguments = [sys.executable, "-c", VLLM_PROGRAM, str(tmp_path / "lm"), str(tmp_path / "rows.json")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for prompt, response, logprobs in json.loads((tmp_path / "rows.json").read_text()):
        tokens = torch.tensor([prompt + response])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(response)])
        ours = response_logprobs(PolicyModel(model), tokens, torch.ones_like(tokens), mask, temperature=0.7)
        torch.testing.assert_close(ours[0, len(prompt) - 1 :], torch.tensor(logprobs), atol=1e-4, rtol=0)
        untempered = response_logprobs(PolicyModel(model), tokens, torch.ones_like(tokens), mask)
        assert (untempered[0, len(prompt) - 1 :] - torch.tensor(logprobs)).abs().max() > 0.01
