"""What a request may ask for: every limit from both sides, and what is passed on."""

import json

import pytest

from serving.errors import ApiError
from serving.requests import CHECKS, Bounds, completion, parse, score
from serving.settings import Limits, ServingSettings

BOUNDS = Bounds(Limits(), context_tokens=64, prompt_tokens=40, max_tokens=24, vocabulary=97)
CHAT = {"messages": [{"role": "user", "content": "w5"}]}
PROMPT = {"prompt": "w5"}


def refused(path: str, body: dict) -> ApiError:
    with pytest.raises(ApiError) as caught:
        CHECKS[path](body, BOUNDS)
    assert caught.value.status == 400
    return caught.value


def passed(path: str, body: dict) -> dict:
    return json.loads(CHECKS[path](body, BOUNDS).body)


@pytest.mark.parametrize(
    ("param", "good", "bad"),
    [
        ("max_tokens", 24, 25),
        ("max_tokens", 1, 0),
        ("max_tokens", 1, True),
        ("max_tokens", 1, "1"),
        ("max_tokens", 1, 1.5),
        ("n", 8, 9),
        ("n", 1, 0),
        ("logprobs", 5, 6),
        ("logprobs", 0, -1),
        ("stop", ["a"] * 4, ["a"] * 5),
        ("stop", "a" * 64, "a" * 65),
        ("stop", "a", ""),
        ("stop", ["a"], [1]),
        ("stop", ["a"], {"a": 1}),
        ("stop_token_ids", [96], [97]),
        ("stop_token_ids", [1] * 16, [1] * 17),
        ("stream", True, "yes"),
        ("min_tokens", 24, 25),
        ("temperature", 0, -0.1),
        ("temperature", 1.5, float("nan")),
        ("temperature", 1.5, True),
        ("top_p", 1, 0),
        ("top_p", 0.5, "0.5"),
        ("min_p", 0, 1.1),
        ("top_k", -1, 10**40),
        ("top_k", 5, 1.5),
        ("seed", 2**63 - 1, 2**63),
        ("seed", 0, -1),
        ("frequency_penalty", -2, -2.1),
        ("presence_penalty", 2, 2.1),
        ("repetition_penalty", 1, 0),
        ("echo", True, 1),
        ("ignore_eos", False, "no"),
        ("prompt", [1] * 40, [1] * 41),
        ("prompt", [96], [97]),
        ("prompt", [0], [-1]),
        ("prompt", [1, 2], [1, True]),
        ("prompt", ["w5"] * 32, ["w5"] * 33),
        ("prompt", [[1], [2]], [[1], []]),
        ("prompt", ["w5"], ["w5", [1]]),
        ("prompt", "w5", ""),
        ("prompt", "w5", {"text": "w5"}),
        ("prompt", "w5", []),
    ],
)
def test_every_limit_of_a_completion_has_two_sides(param, good, bad):
    assert passed("/v1/completions", {**PROMPT, param: good})[param] == good
    assert refused("/v1/completions", {**PROMPT, param: bad}).param == param


def test_options_of_a_stream_are_for_streams():
    options = {"include_usage": True}
    assert passed("/v1/completions", {**PROMPT, "stream": True, "stream_options": options})["stream_options"] == options
    refused("/v1/completions", {**PROMPT, "stream_options": options})
    refused("/v1/completions", {**PROMPT, "stream": True, "stream_options": {"other": True}})
    refused("/v1/completions", {**PROMPT, "stream": True, "stream_options": {"include_usage": 1}})


def test_prompts_times_choices_are_bounded():
    assert completion({"prompt": ["w5"] * 8, "n": 8}, BOUNDS).n == 8
    assert "64 sequences" in refused("/v1/completions", {"prompt": ["w5"] * 9, "n": 8}).message


def test_nothing_is_generated_only_where_the_prompt_is_echoed():
    assert passed("/v1/completions", {**PROMPT, "echo": True, "max_tokens": 0})["max_tokens"] == 0
    refused("/v1/completions", {**PROMPT, "max_tokens": 0})


@pytest.mark.parametrize(
    "field",
    [
        "prompt_embeds",
        "kv_transfer_params",
        "vllm_xargs",
        "use_beam_search",
        "structured_outputs",
        "response_format",
        "priority",
        "request_id",
        "cache_salt",
        "chat_template",
        "lora_request",
        "logit_bias",
        "x" * 500,
    ],
)
def test_fields_that_reach_into_an_engine_are_refused(field):
    error = refused("/v1/completions", {**PROMPT, field: 1})
    assert "not a field" in error.message
    assert len(error.message) < 200
    refused("/v1/chat/completions", {**CHAT, field: 1})
    assert field not in passed("/v1/completions", {**PROMPT, field: None})


def test_what_openais_clients_send_along_is_left_out():
    assert set(passed("/v1/completions", {**PROMPT, "user": "ada", "model": "sft"})) == {
        "prompt",
        "model",
        "max_tokens",
    }


def test_a_request_that_says_nothing_gets_bounded_defaults():
    assert passed("/v1/completions", PROMPT)["max_tokens"] == 16
    assert passed("/v1/chat/completions", CHAT)["max_tokens"] == 24
    assert passed("/v1/chat/completions", {**CHAT, "max_completion_tokens": 3})["max_completion_tokens"] == 3


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [{"role": "user"}],
        [{"role": ["user"], "content": "w5"}],
        [{"role": "tool", "content": "w5"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        [{"role": "user", "content": "w5", "tool_calls": []}],
        [{"role": "user", "content": 5}],
    ],
)
def test_messages_are_texts_with_known_roles(messages):
    refused("/v1/chat/completions", {"messages": messages})
    assert passed("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]})


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff\xfe", b"1" * 5000, b"[" * 100_000, b'{"a": ' * 10_000, b'"\x00"', b"null"]
)
def test_what_is_no_json_object_is_a_bad_request(raw):
    with pytest.raises(ApiError) as caught:
        parse(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize("raw", [b'{"prompt": "w5", "temperature": NaN}', b'{"prompt": "\\ud800"}'])
def test_what_json_has_no_word_for_does_not_reach_an_engine(raw):
    with pytest.raises(ApiError) as caught:
        completion(parse(raw), BOUNDS)
    assert caught.value.status == 400


def test_pairs_and_lists_are_read():
    pairs = score({"model": "rm", "pairs": [{"prompt": "a", "response": "b", "finished": False}]}, Limits())
    assert (pairs.items, pairs.pairs) == ([("a", [("b", False)])], True)
    lists = score({"lists": [{"prompt": "a", "responses": ["b", "c"]}]}, Limits())
    assert lists.items == [("a", [("b", True), ("c", True)])]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pairs": [], "lists": []},
        {"pairs": []},
        {"pairs": "x"},
        {"pairs": [{"prompt": "a"}]},
        {"pairs": [{"prompt": "a", "response": 1}]},
        {"pairs": [{"prompt": "a", "response": "b", "other": 1}]},
        {"pairs": [{"prompt": "a", "response": "b", "finished": [True]}]},
        {"lists": [{"prompt": "a", "responses": []}]},
        {"lists": [{"prompt": "a", "responses": ["b"], "finished": [True, False]}]},
        {"pairs": [{"prompt": "a", "response": "b"}] * 257},
        {"pairs": [{"prompt": "a", "response": "b"}], "n": 1},
        {"pairs": [{"prompt": "\ud800", "response": "b"}]},
        {"lists": [{"prompt": "a", "responses": ["b", "\udfff"]}]},
    ],
)
def test_other_bodies_are_not_scored(body):
    with pytest.raises(ApiError) as caught:
        score(body, Limits())
    assert caught.value.status == 400


def test_another_scorer_is_not_found():
    with pytest.raises(ApiError) as caught:
        score({"model": "gold", "pairs": [{"prompt": "a", "response": "b"}]}, Limits())
    assert caught.value.status == 404


def test_settings_that_hold_no_engine_are_refused():
    with pytest.raises(ValueError, match="does not hold one engine"):
        ServingSettings(memory_budget_gib=1, engine_gib=2)
    assert ServingSettings(memory_budget_gib=5, engine_gib=2).engines == 2
    with pytest.raises(ValueError, match="less than min_replicas"):
        ServingSettings(min_replicas=2)
