import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.ranking import pair_counts, ranking_loss


def independent_loss(
    scores: list[float], ranks: list[int], prompts: list[int], global_prompts: int, ties_count: bool
) -> float:
    """The paper's formula prompt by prompt and pair by pair."""
    total = 0.0
    for prompt in set(prompts):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        pairs = list(itertools.combinations(rows, 2))
        counted = len(pairs) if ties_count else sum(ranks[i] != ranks[j] for i, j in pairs)
        for i, j in pairs:
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                probability = 1 / (1 + math.exp(-(scores[better] - scores[worse])))
                total -= math.log(probability) / counted
    return total / global_prompts


def test_the_fixture():
    loss = ranking_loss(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long), 1)
    assert loss.item() == pytest.approx(0.25115, abs=5e-6)


@st.composite
def rankings(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
    ranks = [draw(st.integers(0, 3)) for _ in prompts]
    scores = [draw(st.floats(-4, 4, width=32)) for _ in prompts]
    order = draw(st.permutations(range(len(prompts))))
    return [[values[i] for i in order] for values in (scores, ranks, prompts)]


@given(rankings(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_it_equals_an_independent_loop_over_pairs_ties_and_row_order_included(ranking, ties_count):
    scores, ranks, prompts = ranking
    loss = ranking_loss(torch.tensor(scores), torch.tensor(ranks), torch.tensor(prompts), 7, ties_count)
    assert loss.item() == pytest.approx(independent_loss(scores, ranks, prompts, 7, ties_count), abs=1e-5)


def test_without_tied_pairs_in_the_count_a_tie_makes_the_other_pairs_weigh_more():
    scores, ranks, prompts = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.long)
    counted, untied = (ranking_loss(scores, ranks, prompts, 1, ties_count).item() for ties_count in (True, False))
    assert untied == pytest.approx(counted * 3 / 2)


@given(rankings())
@settings(max_examples=40, deadline=None)
def test_splitting_prompts_over_micro_batches_changes_neither_loss_nor_gradient(ranking):
    scores, ranks, prompts = (torch.tensor(values) for values in ranking)
    whole = scores.clone().requires_grad_()
    loss = ranking_loss(whole, ranks, prompts, 7)
    loss.backward()
    split = scores.clone().requires_grad_()
    parts = [ranking_loss(split[prompts == p], ranks[prompts == p], prompts[prompts == p], 7) for p in prompts.unique()]
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(part.detach() for part in parts), loss.detach())
    torch.testing.assert_close(split.grad, whole.grad)


def test_a_prompt_weighs_the_same_whatever_its_k_so_pooled_pairs_differ():
    scores, ranks = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0]), torch.tensor([0, 1, 0, 1, 2])
    prompts = torch.tensor([0, 0, 1, 1, 1])
    by_prompt = ranking_loss(scores, ranks, prompts, 2).item()
    first, second = math.log1p(math.exp(-1)), (2 * math.log1p(math.exp(1)) + math.log1p(math.exp(2))) / 3
    assert by_prompt == pytest.approx((first + second) / 2)
    assert by_prompt != pytest.approx((first + 3 * second) / 4)


def test_tied_pairs_are_dropped_and_not_taken_as_half_labels():
    scores = torch.tensor([3.0, 0.0, 1.0], requires_grad=True)
    prompts = torch.zeros(3, dtype=torch.long)
    all_tied = ranking_loss(scores, torch.zeros(3, dtype=torch.long), prompts, 1)
    all_tied.backward()
    assert all_tied.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.eq(0).all()
    assert pair_counts(scores, torch.tensor([0, 0, 1]), prompts) == (1.0, 2.0)


def test_an_untied_pair_weighs_the_same_whatever_else_is_tied():
    scores, prompts = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
    one_tie = ranking_loss(scores, torch.tensor([0, 1, 1]), prompts, 1).item()
    assert one_tie == pytest.approx(2 * math.log1p(math.exp(-1)) / 3)


def test_pairs_of_different_prompts_are_never_compared():
    counts = pair_counts(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.tensor([4, 9]))
    assert counts == (0.0, 0.0)


def test_accuracy_counts_equal_scores_as_half_right():
    scores, ranks = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0, 1, 2])
    assert pair_counts(scores, ranks, torch.zeros(3, dtype=torch.long)) == (2.5, 3.0)


def test_very_wrong_scores_give_a_finite_loss_and_gradient():
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long), 1)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    torch.testing.assert_close(scores.grad, torch.tensor([-1.0, 1.0]))
