"""Gold and the labelers: a perfect answer is worth 1, every mistake costs, people agree as the paper's do."""

from random import Random

import pytest

from corpus.world import Gold, World, WorldSettings, build_world, defects, gold, pairwise_agreement
from corpus.world.defects import DefectRates, worsen
from corpus.world.gold import WEIGHTS

SETTINGS = WorldSettings(
    pretraining_train=1,
    pretraining_valid=1,
    demonstrations_train=100,
    demonstrations_valid=1,
    prompts_collect=400,
    prompts_ppo=600,
    prompts_heldout=200,
)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SETTINGS)


@pytest.fixture(scope="module")
def metas(world: World) -> list[dict]:
    return [row.meta for row in (*world.prompts_collect, *world.prompts_ppo, *world.prompts_heldout)]


def test_weights_sum_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_a_perfect_answer_is_worth_one(metas: list[dict]) -> None:
    for meta in metas:
        judged = gold(meta, meta["reference"])
        assert judged.total == pytest.approx(1), (meta, judged)
        assert set(judged.components) == set(WEIGHTS)


def test_white_space_around_and_within_an_answer_does_not_matter(metas: list[dict]) -> None:
    for meta in metas[:50]:
        assert gold(meta, "  " + meta["reference"].replace(" ", "  ") + " \n").total == pytest.approx(1)


@pytest.mark.parametrize("response", ["", " ", ".", " , . "])
def test_an_answer_without_words_is_worth_nothing(metas: list[dict], response: str) -> None:
    assert gold(metas[0], response) == Gold(0.0, dict.fromkeys(WEIGHTS, 0.0))


def _with_mistake(mistake: str, meta: dict) -> list[str] | None:
    """Returns the reference with one mistake, None where the task gives no occasion for it."""
    rng, words = Random(3), meta["reference"].split()
    match mistake:
        case "rude":
            wrong = defects.be_rude(rng, meta, words)
        case "grammar":
            wrong = defects.break_grammar(rng, words)
        case "myth":
            wrong = defects.tell_myth(meta, words)
        case "wrong_item":
            wrong = defects.mistake_item(rng, meta, words)
        case "repetition":
            wrong = defects.repeat(rng, meta, words)
        case "filler":
            wrong = [*words, *defects.FILLER.split()]
        case kind:
            constraint = next((c for c in meta["constraints"] if c["type"] == kind), None)
            wrong = words if constraint is None else defects.ignore_constraint(rng, constraint, words)
    return None if wrong == words else wrong


LOWERED = {
    "rude": "clean",
    "grammar": "grammar",
    "myth": "truth",
    "wrong_item": "task",
    "repetition": "no_repetition",
    "filler": "length",
    "start": "constraint",
    "mood": "constraint",
    "place": "constraint",
    "without": "constraint",
}


@pytest.mark.parametrize("mistake", LOWERED)
def test_every_mistake_lowers_gold_and_the_component_it_is_about(metas: list[dict], mistake: str) -> None:
    seen = 0
    for meta in metas:
        wrong = _with_mistake(mistake, meta)
        if wrong is None:
            continue
        seen += 1
        judged = gold(meta, " ".join(wrong))
        assert judged.total < 0.99, (meta, wrong)
        assert judged.components[LOWERED[mistake]] < 1, (meta, wrong)
        if mistake != "filler":
            assert len(wrong) == len(meta["reference"].split())
    assert seen > 20


def test_without_any_mistake_a_demonstration_is_perfect(metas: list[dict]) -> None:
    never = DefectRates(rude=0, grammar=0, constraint=0, myth=0, wrong_item=0, repetition=0, filler=0)
    for meta in metas[:200]:
        assert worsen(Random(0), meta, meta["reference"], never) == meta["reference"]


@pytest.mark.parametrize(
    "response",
    ["well well well well well well .", "anna anna anna", "sure , the the the fox fox .", "well , . . .", "hope , a ."],
)
def test_nonsense_is_worth_little(metas: list[dict], response: str) -> None:
    worth = [gold(meta, response).total for meta in metas]
    assert sum(worth) / len(worth) < 0.6
    assert max(worth) < 0.9


def test_demonstrations_leave_room(world: World) -> None:
    worth = [gold(row.meta, row.response).total for row in world.demonstrations_train]
    assert 0.7 < sum(worth) / len(worth) < 0.9
    assert 0.1 < sum(total > 0.999 for total in worth) / len(worth) < 0.45


def _answers(meta: dict, seed: int, count: int) -> list[str]:
    rates = DefectRates()
    return [worsen(Random(f"{seed}/{i}"), meta, meta["reference"], rates) for i in range(count)]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_ranks_are_whole_start_at_zero_and_leave_no_gap(world: World, count: int) -> None:
    for seed, row in enumerate(world.prompts_collect[:50]):
        answers = _answers(row.meta, seed, count)
        ranks = world.labelers[0].rank(row.meta, answers, seed)
        assert len(ranks) == count
        assert set(ranks) == set(range(max(ranks) + 1))
        assert ranks == world.labelers[0].rank(row.meta, answers, seed)


def test_labelers_err_differently_with_another_seed_and_tie_sometimes(world: World) -> None:
    row = world.prompts_collect[0]
    answers = _answers(row.meta, 0, 6)
    rankings = [world.labelers[0].rank(row.meta, answers, seed) for seed in range(20)]
    assert len({tuple(ranks) for ranks in rankings}) > 5
    assert any(len(set(ranks)) < 6 for ranks in rankings)


def test_labelers_prefer_what_gold_prefers(world: World) -> None:
    right = wrong = 0
    for seed, row in enumerate(world.prompts_collect):
        bad = " ".join(defects.be_rude(Random(seed), row.meta, row.meta["reference"].split()))
        for labeler in (*world.labelers, *world.heldout_labelers):
            good_rank, bad_rank = labeler.rank(row.meta, [row.meta["reference"], bad], seed)
            right += good_rank < bad_rank
            wrong += good_rank > bad_rank
    assert right > 2.5 * wrong > 0


def test_labelers_agree_about_as_often_as_those_of_the_paper(world: World) -> None:
    """InstructGPT's training labelers agree on 72.6 ± 1.5 % of pairs (section 3.4)."""
    people = [*world.labelers, *world.heldout_labelers]
    rankings = {labeler.labeler_id: [] for labeler in people}
    for seed, row in enumerate(world.prompts_collect):
        answers = _answers(row.meta, seed, 6)
        for labeler in people:
            rankings[labeler.labeler_id].append(labeler.rank(row.meta, answers, seed))
    found = list(rankings.values())
    agreements = [pairwise_agreement(found[i], found[j]) for i in range(len(found)) for j in range(i)]
    mean = sum(agreements) / len(agreements)
    assert 0.70 < mean < 0.76, mean


def test_agreement_counts_only_pairs_that_both_tell_apart() -> None:
    assert pairwise_agreement([[0, 1, 2]], [[0, 1, 2]]) == 1
    assert pairwise_agreement([[0, 1]], [[1, 0]]) == 0
    assert pairwise_agreement([[0, 1, 1]], [[0, 1, 2]]) == 1
    with pytest.raises(ValueError, match="told apart"):
        pairwise_agreement([[0, 0]], [[0, 1]])
