"""What scores the policy's responses: the recipe's choice, and the scorer that it describes.

Four kinds: our reward model, a Hugging Face one, a Python function, or a service over HTTP.
"""

import re
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.function_reward import FunctionReward
from actors.http_reward import HTTPReward
from actors.network_rewards import HuggingFaceReward, TrainedReward, check_classifier
from actors.reward_protocol import Reward
from corpus.problems import UsageProblem
from corpus.templates import TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RewardSettings(BaseModel):
    """What scores the policy's responses."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["trained", "huggingface", "function", "http"] = Field(
        default="trained",
        description="trained: the reward model of this run (InstructGPT); huggingface: a sequence classifier with its "
        "own tokenizer; function: Python code; http: a service.",
    )
    model: str | None = Field(
        default=None, description="huggingface only: a directory, or a name on the Hub, of a model with one label."
    )
    template: TemplateName = Field(
        default="auto",
        description="huggingface only: how a conversation is written for that model. auto: its tokenizer's chat "
        "template, else dialogue ('Human: … Assistant: …'); plain: prompt, a space, response. Ours.",
    )
    function: str | None = Field(
        default=None, description="function only: 'module:function', called with two lists of texts."
    )
    url: str | None = Field(default=None, description="http only: where prompts and responses are posted as JSON.")
    token_variable: str | None = Field(
        default=None,
        pattern="^[A-Z_][A-Z0-9_]*$",
        description="http only: name of the environment variable whose value is sent as bearer token, set where the "
        "scoring processes run; the token itself stands in no recipe. None sends none.",
    )
    timeout_s: float = Field(
        default=30.0, gt=0, description="http only: seconds until one request counts as failed. Ours."
    )
    deadline_s: float = Field(
        default=300.0, gt=0, description="http only: seconds of failed attempts after which the run ends. Ours."
    )

    @model_validator(mode="after")
    def _what_the_kind_needs(self) -> "RewardSettings":
        needed = {"huggingface": "model", "function": "function", "http": "url"}
        for kind, name in needed.items():
            given = getattr(self, name) is not None
            if kind == self.kind and not given:
                raise ValueError(f"reward kind {kind} needs {name}")
            if kind != self.kind and given:
                raise ValueError(f"reward {name} is for kind {kind}; the kind is {self.kind}")
        if self.token_variable is not None and self.kind != "http":
            raise ValueError(f"reward token_variable is for kind http; the kind is {self.kind}")
        if self.function is not None and not re.fullmatch(r"[^:]+:[^:]+", self.function):
            raise ValueError(f"reward function should be 'module:function', not {self.function!r}")
        return self


def make_reward(
    settings: RewardSettings,
    directory: str | None,
    tokenizer: "PreTrainedTokenizerFast",
    rows_per_batch: int,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Reward:
    """The scorer that the settings describe, loaded.

    `directory` is the exported reward model of this run (kind "trained"), `tokenizer` the policy's. Networks compute
    `rows_per_batch` rows of 64 tokens at a time (fewer longer ones), HTTP requests carry `rows_per_batch` rows.
    Raises UsageProblem where the model or function does not load or does not fit.
    """
    if settings.kind == "huggingface":
        assert settings.model is not None
        return HuggingFaceReward(settings.model, settings.template, rows_per_batch, device, dtype)
    if settings.kind == "function":
        assert settings.function is not None
        return FunctionReward(settings.function)
    if settings.kind == "http":
        assert settings.url is not None
        return HTTPReward(
            settings.url, rows_per_batch, settings.timeout_s, settings.deadline_s, settings.token_variable
        )
    if directory is None:
        raise UsageProblem("reward kind trained needs a trained reward model, and this run has none.", "reward/missing")
    return TrainedReward(directory, tokenizer, rows_per_batch, device, dtype)


def check_reward(settings: RewardSettings, has_environment: bool = True) -> None:
    """Raises UsageProblem where it can be known beforehand, without loading a network, that the scorer cannot serve.
    `has_environment` says whether scoring processes will have this process's environment, and a token that is in it."""
    if settings.function is not None:
        FunctionReward(settings.function)
    if settings.url is not None:
        token_variable = settings.token_variable if has_environment else None
        HTTPReward(settings.url, 1, settings.timeout_s, settings.deadline_s, token_variable)
    if settings.model is not None:
        check_classifier(settings.model)
