"""The choice of a reward: settings that fit together, what they make, and that docs/rewards.md runs."""

import math
import re
import threading
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from actors.rewards import (
    FunctionReward,
    HTTPReward,
    HuggingFaceReward,
    RewardSettings,
    TrainedReward,
    make_reward,
)
from corpus.problems import UsageProblem
from models.build import load_tokenizer

DOC = Path(__file__).parents[2] / "docs" / "rewards.md"


@pytest.fixture
def tokenizer(reward_export):
    return load_tokenizer(reward_export)


@pytest.mark.parametrize("name", [":f", "module:", "module", "a:b:c", ":"])
def test_a_name_that_is_not_module_and_function_is_refused(name):
    with pytest.raises(ValidationError, match="should be 'module:function'"):
        RewardSettings(kind="function", function=name)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_settings_that_are_not_finite_are_refused(number):
    with pytest.raises(ValidationError, match="finite"):
        RewardSettings(kind="http", url="http://localhost", deadline_s=number)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "huggingface"}, "kind huggingface needs model"),
        ({"kind": "http", "function": "a:b", "url": "http://x"}, "function is for kind function"),
        ({"kind": "trained", "model": "x"}, "model is for kind huggingface"),
        ({"kind": "function", "function": "module.function"}, "module:function"),
        ({"kind": "magic"}, "trained"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings.model_validate(settings)


def test_a_trained_reward_without_a_directory_is_a_usage_problem(tokenizer):
    with pytest.raises(UsageProblem, match="this run has none"):
        make_reward(RewardSettings(), None, tokenizer, 4)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_the_docs_examples_run(reward_export, tokenizer, scorer_module, no_proxy, monkeypatch):
    trained, huggingface, function, http = blocks("python")
    for code in (trained, huggingface):
        names: dict = {"directory": reward_export}
        exec(compile(code, str(DOC), "exec"), names)
        assert len(names["scores"]) == 2
        assert all(math.isfinite(number) for number in names["scores"])
    name = scorer_module(function)
    short, long = FunctionReward(f"{name}:brevity").score(["a", "a"], ["b", "a a a"], [], [])
    assert short > long
    names = {}
    exec(compile(http.replace("8080", "0"), str(DOC), "exec"), names)
    server = names["server"]
    monkeypatch.setattr(names["Scorer"], "log_message", lambda *_: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scores = HTTPReward(f"http://127.0.0.1:{server.server_address[1]}/score", 8, 5, 5).score(["a"], ["x" * 50], [], [])
    server.shutdown()
    server.server_close()
    assert scores == [-0.5]


def test_the_docs_recipes_are_valid_and_make_the_rewards_they_say(reward_export, tokenizer, scorer_module):
    name = scorer_module("def brevity(prompts, responses):\n    return [0.0] * len(responses)\n")
    made = []
    for text in blocks("yaml"):
        settings = RewardSettings.model_validate(yaml.safe_load(text)["reward"])
        if settings.kind == "huggingface":
            settings = settings.model_copy(update={"model": reward_export})
        if settings.kind == "function":
            settings = settings.model_copy(update={"function": f"{name}:brevity"})
        made.append(type(make_reward(settings, reward_export, tokenizer, 4)))
    assert made == [TrainedReward, HuggingFaceReward, FunctionReward, HTTPReward]
