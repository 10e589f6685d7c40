"""Packed rows against the same networks on padded batches: numbers and gradients are the same, padding is not read."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from models import packing
from models.export import export_causal_lm
from models.forward import PolicyModel
from models.packing import ATTENTION, LENGTH_STEP, PACKABLE_TYPES, Layout, packs
from models.scalar_head import ScalarHeadModel

SMALL = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24} | SMALL
GROUPED = SHAPE | {"num_key_value_heads": 1}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    config.model_type: config
    for config in (
        GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SMALL
        ),
        GPTNeoXConfig(**SHAPE),
        GraniteConfig(**GROUPED),
        LlamaConfig(**GROUPED),
        MistralConfig(sliding_window=None, head_dim=8, **GROUPED),
        Olmo2Config(**GROUPED),
        Phi3Config(**GROUPED),
        Qwen2Config(**GROUPED),
        Qwen3Config(head_dim=8, **GROUPED),
    )
}
LENGTHS = (40, 33, 7, 25, 2, 39)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and targets of right-padded rows: packed they are 192 tokens rather than 240."""
    torch.manual_seed(1)
    attention = (torch.arange(40)[None] < torch.tensor(LENGTHS)[:, None]).long()
    targets = attention.bool() & (torch.arange(40) >= 2)[None]
    return torch.randint(2, 50, attention.shape) * attention, attention, targets


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGURATIONS[kind])).train()


def tokens_read(model: torch.nn.Module) -> list[int]:
    """Filled, call by call, with how many tokens the embedding reads."""
    seen: list[int] = []
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def same_gradients(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert gradients(found).keys() == gradients(expected).keys() != set()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(found)[name], gradient, atol=2e-6, rtol=1e-4, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients(expected).values())


def test_every_packable_type_is_compared_here():
    assert set(CONFIGURATIONS) == PACKABLE_TYPES


@pytest.mark.parametrize("kind", sorted(PACKABLE_TYPES))
def test_logprobs_and_gradients_are_those_of_the_padded_batch(kind, batch):
    plain = PolicyModel(model_of(kind))
    packed = PolicyModel(copy.deepcopy(plain.causal_lm))
    assert packed.pack_rows()
    read = {name: tokens_read(model) for name, model in (("plain", plain), ("packed", packed))}
    weights = torch.randn(batch[2][:, 1:].shape)
    found = {}
    for name, model in (("plain", plain), ("packed", packed)):
        found[name], entropy = model(*batch, temperature=0.7, with_entropy=True, entropy_gradient=True)
        ((found[name] * weights).sum() / 100 + entropy.sum() / 100).backward()
    assert read == {"plain": [240], "packed": [192]}
    torch.testing.assert_close(found["packed"], found["plain"], atol=2e-6, rtol=1e-5)
    same_gradients(packed, plain)


@pytest.mark.parametrize("kind", sorted(PACKABLE_TYPES))
def test_values_and_gradients_are_those_of_the_padded_batch(kind, batch):
    plain = ScalarHeadModel(AutoModel.from_config(copy.deepcopy(CONFIGURATIONS[kind])).train())
    packed = copy.deepcopy(plain)
    assert packed.pack_rows()
    tokens, attention, _ = batch
    weights = torch.randn(tokens.shape)
    found = {}
    for name, model in (("plain", plain), ("packed", packed)):
        found[name] = model(tokens, attention)
        (found[name] * weights).sum().backward()
    torch.testing.assert_close(found["packed"], found["plain"], atol=2e-6, rtol=1e-5)
    same_gradients(packed, plain)


def test_recomputed_activations_give_the_same_gradients(batch):
    plain = PolicyModel(model_of("llama"))
    packed = PolicyModel(copy.deepcopy(plain.causal_lm))
    packed.pack_rows()
    packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    read = tokens_read(packed)
    for model in (plain, packed):
        model(*batch)[0].sum().backward()
    assert read == [192]
    same_gradients(packed, plain)


def test_rows_do_not_see_each_other(batch):
    """Other tokens in every row but one leave that one's numbers as they are, to the bit."""
    model = PolicyModel(model_of("llama"))
    model.pack_rows()
    tokens, attention, targets = batch
    other = torch.randint(2, 50, tokens.shape) * attention
    for row in range(len(LENGTHS)):
        changed = other.clone()
        changed[row] = tokens[row]
        found, expected = model(changed, attention, targets)[0], model(tokens, attention, targets)[0]
        assert torch.equal(found[row], expected[row])
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([[0, 0, *[1] * 98], [1] * 100], "pads that come first must be masked"),
        ([[1] * 100, [1] * 99 + [0]], "rounding up leaves nothing to gain"),
    ],
)
def test_other_batches_are_read_as_they_are(mask, why):
    plain = PolicyModel(model_of("llama"))
    packed = PolicyModel(copy.deepcopy(plain.causal_lm))
    packed.pack_rows()
    read = tokens_read(packed)
    attention = torch.tensor(mask)
    tokens = torch.randint(2, 50, attention.shape)
    targets = attention.bool() & (torch.arange(100) >= 4)[None]
    assert torch.equal(packed(tokens, attention, targets)[0], plain(tokens, attention, targets)[0]), why
    assert read == [200], why


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16),
        MistralConfig(sliding_window=8, **GROUPED),
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, **GROUPED),
        LlamaConfig(is_causal=False, **GROUPED),
    ],
    ids=["a type that is not compared", "a sliding window", "a sliding window where it is asked for", "not causal"],
)
def test_networks_that_would_mix_rows_are_not_packed(config):
    model = PolicyModel(AutoModelForCausalLM.from_config(config))
    assert not model.pack_rows()
    assert not packs(model.causal_lm)


def test_a_batch_without_any_token_gives_zeros(batch):
    model = ScalarHeadModel(AutoModel.from_config(CONFIGURATIONS["llama"]))
    model.pack_rows()
    tokens, attention, _ = batch
    assert not model(tokens, attention * 0).any()


def test_an_export_does_not_name_our_attention(tmp_path, tokenizer, batch):
    model = PolicyModel(model_of("llama"))
    model.pack_rows()
    export_causal_lm(tmp_path, model.config, model.causal_lm.state_dict(), tokenizer, 8)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    scalar = ScalarHeadModel.from_causal_lm(str(tmp_path), seed=0)
    scalar.pack_rows()
    for name, save in (("reward", scalar.save_reward_model), ("value", scalar.save_value_model)):
        save(tmp_path / name, tokenizer)
        assert ATTENTION not in (tmp_path / name / "config.json").read_text()
    assert not packs(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_layout_lists_every_real_token_once_and_fills_up():
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    layout = Layout.of(real)
    assert layout.places.tolist() == [[0, 1, 2], [3, -1, -1], [-1, -1, -1], [4, 5, -1]]
    assert layout.tokens == LENGTH_STEP
    arguments = layout.arguments(torch.arange(12).view(4, 3) + 20)
    assert arguments["input_ids"][0, :6].tolist() == [20, 21, 22, 23, 29, 30]
    assert arguments["position_ids"][0, :6].tolist() == [0, 1, 2, 0, 0, 1]
    assert arguments["input_ids"][0, 6:].unique().tolist() == [20]


def test_the_two_ways_are_each_others_gradient():
    """Against torch's own gradient of the indexing, in float64."""
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    layout = Layout.of(real)
    homes = packing._homes(layout.places, layout.tokens)
    packed = torch.randn(1, 2, layout.tokens, 4, dtype=torch.float64, requires_grad=True)
    spread = torch.randn(3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    kept = real[:, None, :, None]  # what lies at pads is of no meaning, and nothing flows back from it
    assert torch.autograd.gradcheck(lambda x: packing._Spread.apply(x, layout.places, homes) * kept, packed)
    used = (torch.arange(layout.tokens) < 6)[None, :, None, None]
    assert torch.autograd.gradcheck(lambda x: packing._Gather.apply(x, layout.places, homes) * used, spread)
