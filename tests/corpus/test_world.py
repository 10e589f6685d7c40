"""The built-in world: the same seed gives the same world, held-out prompts stay held out, gold and labelers judge."""

import re
from collections import Counter

import pytest
from pydantic import ValidationError

from corpus.problems import UsageProblem
from corpus.world import World, WorldSettings, build_world, gold, write_tokenizer
from corpus.world.build import side_of
from corpus.world.lexicon import WORDS

SMALL = WorldSettings(
    pretraining_train=3000,
    pretraining_valid=100,
    demonstrations_train=400,
    demonstrations_valid=50,
    prompts_collect=200,
    prompts_ppo=300,
    prompts_heldout=150,
)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SMALL)


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert build_world(SMALL) == world
    other = build_world(SMALL.model_copy(update={"seed": 1}))
    assert other.demonstrations_train != world.demonstrations_train
    assert other.pretraining_train != world.pretraining_train
    assert other.labelers != world.labelers


def test_the_size_of_one_part_does_not_change_another(world: World) -> None:
    other = build_world(SMALL.model_copy(update={"pretraining_train": 10, "prompts_collect": 3}))
    assert other.demonstrations_train == world.demonstrations_train
    assert other.prompts_heldout == world.prompts_heldout
    assert other.prompts_collect == world.prompts_collect[:3]


def test_parts_have_the_sizes_asked_for(world: World) -> None:
    assert world.synthetic
    for name in ("pretraining_train", "pretraining_valid", "demonstrations_train", "demonstrations_valid",
                 "prompts_collect", "prompts_ppo", "prompts_heldout"):  # fmt: skip
        assert len(getattr(world, name)) == getattr(SMALL, name), name
    assert len(world.labelers) == 5
    assert len(world.heldout_labelers) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heldout_share": 1e-9}, r"heldout_share 1e-09 leaves too few instructions for held-out prompts: .*raise it"),
        ({"heldout_share": 1 - 1e-9}, r"heldout_share 1 .* leave too few instructions for training: .*lower one"),
        ({"validation_share": 1e-9}, r"validation_share 1e-09 leaves too few instructions for validation: .*raise it"),
        (
            {"heldout_share": 3e-3, "prompts_heldout": 10**6, "pretraining_train": 1},
            r"raise it or lower world.prompts_heldout \(1000000\)",
        ),
    ],
)
def test_a_share_that_leaves_no_instructions_ends_in_a_sentence(changed, message, monkeypatch) -> None:
    monkeypatch.setattr("corpus.world.build.MOST_DRAWS", 3_000)
    with pytest.raises(UsageProblem, match=message):
        build_world(SMALL.model_copy(update=changed))


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="sede"):
        WorldSettings.model_validate({"sede": 3})


def test_no_user_is_in_two_splits_and_ids_are_unique(world: World) -> None:
    parts = [
        world.demonstrations_train,
        world.demonstrations_valid,
        world.prompts_collect,
        world.prompts_ppo,
        world.prompts_heldout,
    ]
    ids = [row.prompt_id for part in parts for row in part]
    assert len(ids) == len(set(ids))
    users = [{row.user_id for row in part} for part in parts]
    assert sum(map(len, users)) == len(set().union(*users))
    assert max(Counter(row.user_id for part in parts for row in part).values()) <= 200


def test_shares_that_leave_nothing_for_training_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"heldout_share 0.5 and validation_share 0.5 leave no instructions"):
        WorldSettings.model_validate({"heldout_share": 0.5, "validation_share": 0.5})


def _bag(prompt: str) -> str:
    """The prompt without order, courtesy and the constraint on its first word: equal for reworded prompts."""
    words = prompt.removeprefix("please ").removeprefix("hey , ").split(" start with ")[0].split()
    return " ".join(sorted(words))


def test_heldout_prompts_and_their_rewordings_are_in_no_training_text(world: World) -> None:
    heldout = {row.prompt for row in world.prompts_heldout}
    assert len(heldout) == len(world.prompts_heldout)
    forum = [text for text in world.pretraining_train if text.startswith("question : ")]
    asked = [part.split(" answer : ")[0] for text in forum for part in text.split("question : ") if part]
    asked += [row.prompt for row in (*world.demonstrations_train, *world.prompts_collect, *world.prompts_ppo)]
    assert len(asked) > 1000
    assert not heldout.intersection(prompt.strip() for prompt in asked)
    assert not {_bag(prompt) for prompt in heldout} & {_bag(prompt) for prompt in asked}
    everything = "\n".join(world.pretraining_train)
    assert not [prompt for prompt in heldout if prompt in everything]


def test_the_search_for_heldout_prompts_would_find_one(world: World) -> None:
    row = world.demonstrations_train[0]
    assert _bag(row.prompt) == _bag("please " + row.prompt.removeprefix("please ").removeprefix("hey , "))
    assert any(text.startswith("question : ") and " answer : " in text for text in world.pretraining_train)


def test_about_the_stated_share_of_instructions_is_on_each_side() -> None:
    sides = Counter(side_of(SMALL, f"kind/{number}") for number in range(5000))
    assert sides["held-out"] / 5000 == pytest.approx(SMALL.heldout_share, abs=0.02)
    assert sides["validation"] / 5000 == pytest.approx(SMALL.validation_share, abs=0.02)


CONSTRAINTS = re.compile(r" (start with \S+|make it \S+|set it in the \S+) \.")


def _instruction(prompt: str) -> str:
    """The prompt without courtesy and constraints, but for "without", which makes another instruction of a list."""
    return CONSTRAINTS.sub("", prompt.removeprefix("please ").removeprefix("hey , "))


def _validates(user_id: str) -> bool:
    return int(user_id[-1]) in (3, 7)


def _instructions_of_validation_and_training(validates) -> tuple[list[str], set[str]]:
    """What validation asks, of demonstrations and comparisons, and what anything that is trained on asks; of a world
    whose collected prompts are split by `validates`, their users in `_validates` being those that are held out."""
    world = build_world(SMALL, validates)
    collected = {
        side: [row for row in world.prompts_collect if _validates(row.user_id) is side] for side in (False, True)
    }
    asked = [row.prompt for row in (*world.demonstrations_train, *collected[False], *world.prompts_ppo)]
    asked += [text.split(" answer : ")[0] for text in world.pretraining_train if text.startswith("question : ")]
    asked += [text.split(" reply : ")[0] for text in world.pretraining_train if text.startswith("ask : ")]
    training = {_instruction(prompt.removeprefix("question : ").removeprefix("ask : ")) for prompt in asked}
    validation = [*world.demonstrations_valid, *collected[True]]
    assert len(collected[True]) == 2 * SMALL.prompts_per_user
    return [_instruction(row.prompt) for row in validation], training


def test_no_training_row_asks_what_validation_asks_in_any_wording() -> None:
    validation, training = _instructions_of_validation_and_training(_validates)
    assert len(training) > 800
    assert len(set(validation)) > 50
    assert not training & set(validation)


def test_the_search_for_shared_instructions_would_find_some() -> None:
    validation, training = _instructions_of_validation_and_training(lambda user: False)
    assert any(each in training for each in validation)


def test_validation_prompts_are_all_different() -> None:
    world = build_world(SMALL, _validates)
    assert len({row.prompt for row in world.demonstrations_valid}) == SMALL.demonstrations_valid
    collected = [row.prompt for row in world.prompts_collect if _validates(row.user_id)]
    assert len(set(collected)) == len(collected)


def test_every_kind_of_instruction_and_constraint_is_asked(world: World) -> None:
    kinds = Counter(row.meta["kind"] for row in world.prompts_ppo)
    assert set(kinds) == {"generation", "open_qa", "brainstorming", "chat", "rewrite", "summarisation",
                          "classification", "closed_qa", "extraction"}  # fmt: skip
    assert kinds.most_common(1)[0][0] == "generation"
    constraints = Counter(c["type"] for row in world.prompts_ppo for c in row.meta["constraints"])
    assert set(constraints) == {"start", "mood", "place", "without"}


def test_mistakes_in_demonstrations_do_not_change_their_length(world: World) -> None:
    lengths = {True: [], False: []}
    for row in world.demonstrations_train:
        perfect = gold(row.meta, row.response).total > 0.999
        lengths[perfect].append(len(row.response.split()) - len(row.meta["reference"].split()))
    assert min(len(part) for part in lengths.values()) > 50
    means = {perfect: sum(part) / len(part) for perfect, part in lengths.items()}
    assert means[True] == 0
    assert 0 <= means[False] < 0.5
    assert sum(1 for difference in lengths[False] if difference == 0) > 0.9 * len(lengths[False])


def test_the_tokenizer_knows_every_word_and_gives_texts_back(world: World, tmp_path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(world, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(WORDS) + 3
    texts = [*world.pretraining_train, *world.pretraining_valid]
    for part in (world.demonstrations_train, world.demonstrations_valid):
        texts += [f"{row.prompt} {row.response}" for row in part]
    for part in (world.prompts_collect, world.prompts_ppo, world.prompts_heldout):
        texts += [f"{row.prompt} {row.meta['reference']}" for row in part]
    for text, tokens in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in tokens, text
    for text in texts[::50]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_the_chat_template_asks_a_question_and_adds_no_other_token(world: World, tmp_path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(world, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "what does the fox eat ?"}]
    tokens = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert tokens == tokenizer("question : what does the fox eat ? answer :")["input_ids"]
    messages += [{"role": "assistant", "content": "sure"}, {"role": "user", "content": "where ?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "question : what does the fox eat ? answer : sure <eos> question : where ? answer :"


def test_every_word_of_the_lexicon_is_used(world: World) -> None:
    used = {word for text in world.pretraining_train for word in text.split()}
    assert set(WORDS) - used == set()
