import torch
from torch.nn import functional as F

from objectives.language_model import token_cross_entropy


def test_it_is_torch_s_cross_entropy_over_the_tokens_that_count():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ignored = targets.masked_fill(~mask, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(token_cross_entropy(logprobs, mask, 5), expected)


def test_it_divides_by_the_global_count_and_not_by_its_own():
    logprobs, mask = torch.full((1, 2), -3.0), torch.ones(1, 2, dtype=torch.bool)
    assert token_cross_entropy(logprobs, mask, 8).item() == 0.75
