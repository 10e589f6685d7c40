import pytest
import torch

from objectives.masks import last_index, masked_mean, masked_sum


def test_what_stands_at_masked_places_reaches_neither_result_nor_gradient():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    total = masked_sum(x, mask)
    total.backward()
    assert total.item() == 5.0
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_mean_divides_by_the_tokens_that_count():
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, dim=-1).tolist() == [2.0, 5.0]
    assert masked_mean(x, mask).item() != x.mean().item()


def test_last_index_is_the_last_unmasked_place_not_the_count():
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    assert last_index(mask).tolist() == [2, 3]


def test_a_row_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        last_index(torch.tensor([[True], [False]]))
