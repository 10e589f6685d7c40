"""Networks that score: the numbers of transformers, whatever is scored beside, and what is refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from actors.network_rewards import HuggingFaceReward, TrainedReward, check_classifier
from corpus.problems import UsageProblem
from corpus.templates import encode_prompts, encode_responses
from corpus.tokenising import train_bpe_tokenizer
from models.build import load_tokenizer

PROMPTS = [
    "hello",
    "what is the capital of France and why",
    "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
] * 7
RESPONSES = [" ".join(["word"] * (number % 8 + 1)) for number in range(len(PROMPTS))]


@pytest.fixture
def tokenizer(reward_export):
    return load_tokenizer(reward_export)


def score(reward, tokenizer, rows=None):
    prompts = [PROMPTS[row] for row in rows] if rows is not None else PROMPTS
    responses = [RESPONSES[row] for row in rows] if rows is not None else RESPONSES
    return reward.score(prompts, responses, encode_prompts(tokenizer, prompts), encode_responses(tokenizer, responses))


def test_the_trained_reward_is_transformers_score_at_the_last_token_plus_the_bias(reward_export, tokenizer):
    from transformers import AutoModelForSequenceClassification

    scores = score(TrainedReward(reward_export, tokenizer, rows_per_batch=2), tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(reward_export)
    for row in (0, 1, 2):
        tokens = encode_prompts(tokenizer, [PROMPTS[row]])[0] + encode_responses(tokenizer, [RESPONSES[row]])[0]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits.item() + 0.75
        assert scores[row] == pytest.approx(expected, abs=1e-5)
    assert len({round(number, 4) for number in scores}) == len(scores), "negative control: the scores differ"


@pytest.mark.parametrize("kind", [TrainedReward, HuggingFaceReward])
def test_a_score_does_not_depend_on_its_neighbours_bit_for_bit(kind, reward_export, tokenizer):
    reward = kind(reward_export, tokenizer if kind is TrainedReward else "auto", rows_per_batch=2)
    scores = score(reward, tokenizer)
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    assert score(reward, tokenizer, order) == [scores[row] for row in order]
    assert score(reward, tokenizer, [5]) == [scores[5]]
    assert score(reward, tokenizer, [3, 3, 9]) == [scores[3], scores[3], scores[9]]


def test_no_responses_have_no_scores(reward_export, tokenizer):
    for reward in (TrainedReward(reward_export, tokenizer, 4), HuggingFaceReward(reward_export, "auto", 4)):
        assert reward.score([], [], [], []) == []


def test_another_vocabulary_is_refused(reward_export, tmp_path):
    other = train_bpe_tokenizer(["entirely different letters"], 270, tmp_path)
    with pytest.raises(UsageProblem, match="another vocabulary"):
        TrainedReward(reward_export, other, 4)


def test_a_hugging_face_reward_writes_the_conversation_as_its_tokenizer_says(reward_export, tokenizer):
    # Our own export, read as anybody's model: the conversation ends without EOS, as its template writes none.
    reward = HuggingFaceReward(reward_export, "auto", 4)
    assert reward.encode([PROMPTS[2]], ["d "]) == [
        tokenizer("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")["input_ids"]
    ]
    tokens = encode_prompts(tokenizer, PROMPTS), encode_responses(tokenizer, RESPONSES, end=False)
    trained = TrainedReward(reward_export, tokenizer, 4).score(PROMPTS, RESPONSES, *tokens)
    assert reward.score(PROMPTS, RESPONSES, [], []) == pytest.approx(trained, abs=1e-5)
    plain = HuggingFaceReward(reward_export, "plain", 4)
    assert plain.encode(["a"], ["b"]) == [tokenizer("a b")["input_ids"]]


def test_a_classifier_with_special_tokens_of_its_own_gets_them_once(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "human", "assistant", ":", "hello", "hi"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    reward = HuggingFaceReward(str(tmp_path), "auto", 4)
    assert reward.encode(["hello"], ["hi"]) == [[2, 5, 7, 8, 6, 7, 9, 3]]
    (long,) = reward.encode(["hello " * 30], ["hi"])
    assert (len(long), long[0], long[-4:]) == (12, 2, [6, 7, 9, 3]), "what is too long loses its beginning"
    assert len(set(reward.score(["hello", "hello " * 30], ["hi", "hi"], [], []))) == 2


def test_a_classifier_without_a_pad_token_scores_row_by_row(reward_export, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_export)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(reward_export)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    scores = HuggingFaceReward(str(tmp_path), "auto", 4).score(PROMPTS, RESPONSES, [], [])
    assert scores == pytest.approx(
        HuggingFaceReward(reward_export, "auto", 4).score(PROMPTS, RESPONSES, [], []), abs=1e-5
    )


def test_a_classifier_with_two_labels_is_refused(reward_export, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        reward_export, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageProblem, match="gives 2 numbers"):
        HuggingFaceReward(str(tmp_path), "auto", 4)


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()


def _of_another_kind(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "clip_text_model", "num_labels": 1}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_weights, r"there is no \.safetensors file"),
        (_cut_short, r"model\.safetensors is damaged"),
        (_without_tokenizer, "its tokenizer does not load"),
        (_of_another_kind, "has no sequence classifier"),
    ],
)
def test_a_classifier_that_could_not_be_loaded_is_told_without_loading_it(reward_export, tmp_path, damage, says):
    model = shutil.copytree(reward_export, tmp_path / "model")
    check_classifier(str(model))
    damage(model)
    with pytest.raises(UsageProblem, match=says) as told:
        check_classifier(str(model))
    assert "\n" not in str(told.value)


def test_a_chat_template_that_refuses_a_conversation_ends_in_a_sentence(reward_export, tmp_path):
    model = shutil.copytree(reward_export, tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    refused = "\n\nSystem: Be brief.\n\nHuman: hello\n\nAssistant:"
    reward = HuggingFaceReward(str(model), "auto", 4)
    assert reward.encode(["hello"], ["hi"])
    with pytest.raises(UsageProblem, match=r"refuses the prompt that begins 'System: Be brief.* \(no system turn\)"):
        reward.encode(["hello", refused], ["hi", "hi"])
    assert HuggingFaceReward(str(model), "dialogue", 4).encode([refused], ["hi"])
