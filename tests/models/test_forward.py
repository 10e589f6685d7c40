import copy

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from models.forward import (
    PolicyModel,
    causal_logprobs,
    mask_arguments,
    plain_names,
    position_ids,
    response_logprobs,
    response_values,
)
from models.scalar_head import ScalarHeadModel

PROMPT, RESPONSE = [5, 9, 17], [21, 8, 33, 1]
SMALL = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
ARCHITECTURES = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SMALL
    ),
    "opt": OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=8, **SMALL
    ),
    "bloom, without position ids": BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL),
    "gemma2, which caps its logits after the unembedding": Gemma2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        final_logit_softcapping=2.0,
        sliding_window=4,
        **SMALL,
    ),
    "qwen2": Qwen2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, **SMALL
    ),
}


@pytest.fixture(params=["llama", *ARCHITECTURES])
def causal_lm(request, llama) -> PreTrainedModel:
    if request.param == "llama":
        return llama
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[request.param])).eval()
    for parameter in model.parameters():  # default weights are so small that every token looks alike
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def padded(left: int, right: int, inside: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and response mask of one sequence with pads at three places."""
    tokens = [0] * left + PROMPT[:1] + [0] * inside + PROMPT[1:] + RESPONSE + [0] * right
    attention = [0] * left + [1] + [0] * inside + [1] * 6 + [0] * right
    response = [0] * (left + 1 + inside + 2) + [1] * 4 + [0] * right
    return torch.tensor([tokens]), torch.tensor([attention]), torch.tensor([response])


def expected_response(model: PreTrainedModel, temperature: float) -> torch.Tensor:
    """From the whole logits of the bare sequence, at [prompt − 1 : −1]."""
    logits = model(input_ids=torch.tensor([PROMPT + RESPONSE])).logits[0, len(PROMPT) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(RESPONSE)[:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 3), (2, 2)])
def test_response_logprobs_are_those_at_prompt_minus_one_whatever_the_padding(causal_lm, left, right, temperature):
    tokens, attention, response = padded(left, right)
    logprobs = response_logprobs(PolicyModel(causal_lm), tokens, attention, response, temperature)
    assert logprobs.shape == (1, tokens.shape[1] - 1)
    chosen = response[:, 1:].bool()
    torch.testing.assert_close(logprobs[chosen], expected_response(causal_lm, temperature), atol=2e-5, rtol=1e-5)
    assert logprobs[~chosen].eq(0).all()


def test_logits_one_place_later_would_differ(llama):
    logits = llama(input_ids=torch.tensor([PROMPT + RESPONSE])).logits[0].log_softmax(-1)
    shifted = logits[len(PROMPT) :].gather(-1, torch.tensor(RESPONSE)[:, None]).squeeze(-1)
    assert (shifted - expected_response(llama, 1.0)).abs().max() > 0.1


def test_pads_between_real_tokens_change_nothing(llama):
    tokens, attention, response = padded(1, 1, inside=2)
    logprobs = response_logprobs(PolicyModel(llama), tokens, attention, response)
    torch.testing.assert_close(logprobs[response[:, 1:].bool()], expected_response(llama, 1.0), atol=2e-5, rtol=1e-5)


def test_left_pads_would_change_a_model_with_learned_positions_if_positions_were_plain(llama):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["gpt2"])).eval()
    tokens, attention, _ = padded(3, 0)
    plain = model(input_ids=tokens, attention_mask=attention, position_ids=torch.arange(10)[None]).logits
    ours = model(input_ids=tokens, **mask_arguments(model, attention)).logits
    bare = model(input_ids=torch.tensor([PROMPT + RESPONSE])).logits
    torch.testing.assert_close(ours[:, 3:], bare, atol=2e-5, rtol=1e-5)
    assert (plain[:, 3:] - bare).abs().max() > 1e-3


def test_a_row_s_figures_do_not_depend_on_the_rows_beside_it(llama):
    policy = PolicyModel(llama)
    tokens, attention, response = (torch.cat(pair) for pair in zip(padded(0, 3), padded(2, 1), strict=True))
    together = response_logprobs(policy, tokens, attention, response)
    apart = torch.cat([response_logprobs(policy, *rows) for rows in (padded(0, 3), padded(2, 1))])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-5)


def test_causal_logprobs_cover_every_real_token_that_follows_one(llama):
    tokens, attention, _ = padded(2, 1)
    logprobs, entropy = causal_logprobs(PolicyModel(llama), tokens, attention)
    bare = torch.tensor([PROMPT + RESPONSE])
    every = llama(input_ids=bare).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(logprobs[:, 2:-1], every.gather(-1, bare[:, 1:, None])[..., 0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[:, 2:-1], -(every.exp() * every).sum(-1), atol=2e-5, rtol=1e-5)
    for figures in (logprobs, entropy):
        assert figures[:, [0, 1, -1]].eq(0).all()


def test_entropy_is_of_the_tempered_distribution_without_gradient_and_only_when_asked(llama):
    policy = PolicyModel(llama)
    tokens, attention, response = padded(0, 0)
    assert policy(tokens, attention, response)[1] is None
    warm, cool = (policy(tokens, attention, response, t, with_entropy=True)[1] for t in (1.0, 0.25))
    assert not warm.requires_grad
    assert (cool[response[:, 1:].bool()] < warm[response[:, 1:].bool()]).all()


def test_entropy_carries_a_gradient_for_a_bonus_also_where_tokens_cannot_come(llama):
    tokens, attention, response = padded(0, 0)
    hook = llama.lm_head.register_forward_hook(
        lambda _, __, logits: logits.clone().index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    entropy = PolicyModel(llama)(tokens, attention, response, 1e-2, with_entropy=True, entropy_gradient=True)[1]
    hook.remove()
    assert entropy.isfinite().all()
    entropy.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in llama.parameters())
    assert llama.model.layers[0].mlp.up_proj.weight.grad.ne(0).any()


def test_gradients_are_those_of_the_whole_logits(llama):
    other = copy.deepcopy(llama)
    tokens, attention, response = padded(0, 2)
    response_logprobs(PolicyModel(llama), tokens, attention, response, 0.7).sum().backward()
    expected_response(other, 0.7).sum().backward()
    for (name, parameter), (_, twin) in zip(llama.named_parameters(), other.named_parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_batch_without_targets_gives_every_parameter_a_zero_gradient(llama):
    tokens, attention, _ = padded(0, 2)
    logprobs = response_logprobs(PolicyModel(llama), tokens, attention, torch.zeros_like(tokens))
    logprobs.sum().backward()
    assert logprobs.eq(0).all()
    for parameter in llama.parameters():
        assert parameter.grad is not None
        assert parameter.grad.eq(0).all()


def test_only_positions_before_targets_are_unembedded_and_no_hook_stays(llama):
    rows = []
    policy = PolicyModel(llama)
    tokens, attention, response = padded(0, 3)
    hook = llama.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape))
    response_logprobs(policy, tokens, attention, response)
    hook.remove()
    assert rows == [(1, len(RESPONSE), 50)]
    assert llama(input_ids=tokens).logits.shape == (1, 10, 50)


def test_a_failing_forward_leaves_no_hook_behind(llama):
    tokens, attention, response = padded(0, 0)
    with pytest.raises(IndexError):
        response_logprobs(PolicyModel(llama), tokens + 1000, attention, response)
    assert llama(input_ids=tokens).logits.shape == (1, 7, 50)


def test_probabilities_are_normalised_in_float32_whatever_the_network_s_dtype(llama):
    tokens, attention, response = padded(0, 0)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    logprobs = response_logprobs(PolicyModel(half), tokens, attention, response)
    logits = half(input_ids=tokens).logits[0, len(PROMPT) - 1 : -1]
    exact = logits.double().log_softmax(-1).gather(-1, torch.tensor(RESPONSE)[:, None]).squeeze(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[response[:, 1:].bool()].double(), exact, atol=1e-5, rtol=0)
    in_half = logits.log_softmax(-1).gather(-1, torch.tensor(RESPONSE)[:, None]).squeeze(-1)
    assert (in_half.double() - exact).abs().max() > 1e-4


def test_activation_checkpointing_changes_no_gradient(llama):
    tokens, attention, response = padded(0, 2)
    plain, recomputed = PolicyModel(copy.deepcopy(llama)).train(), PolicyModel(llama).train()
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for policy in (plain, recomputed):
        response_logprobs(policy, tokens, attention, response).sum().backward()
    for parameter, twin in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


def test_positions_are_the_exclusive_cumulative_sum_of_the_mask():
    assert position_ids(torch.tensor([[1, 0, 0, 1, 1, 1]])).tolist() == [[0, 1, 1, 1, 2, 3]]


def test_values_are_read_before_each_response_token_whatever_the_padding(llama):
    value_model = ScalarHeadModel(llama.model, seed=3)
    everywhere = value_model(torch.tensor([PROMPT + RESPONSE]), torch.ones(1, 7))
    for left, right in [(0, 0), (3, 0), (0, 3)]:
        tokens, attention, response = padded(left, right)
        values = response_values(value_model, tokens, attention, response)
        chosen = response[:, 1:].bool()
        torch.testing.assert_close(values[chosen], everywhere[0, len(PROMPT) - 1 : -1], atol=2e-5, rtol=1e-5)
        assert values[~chosen].eq(0).all()


def test_plain_names_are_those_of_the_language_model(llama):
    policy = PolicyModel(llama)
    assert set(plain_names(policy, dict(policy.named_parameters()))) == {name for name, _ in llama.named_parameters()}
    assert plain_names(llama, {"lm_head.weight": torch.zeros(1)}).keys() == {"lm_head.weight"}
