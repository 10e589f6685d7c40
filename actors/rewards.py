"""Rewards are a protocol: our reward model, a Hugging Face one, a Python function, or a service over HTTP.

Invariants:
- `score` returns one finite number for every response, in order, or raises RunProblem naming the scorer.
- A network's score of a response does not depend on what else is scored with it: a sequence is always computed in a
  batch of the same shape, which its own length decides.
"""

import importlib
import math
import os
import re
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from corpus.dialogues import messages_of
from corpus.problems import RunProblem, UsageProblem
from corpus.templates import DIALOGUE_TEMPLATE, PLAIN_TEMPLATE, TemplateName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Tokens = Sequence[Sequence[int]]

WIDTH_STEP = 32
"""Sequences are padded to a multiple of this many tokens."""


class Reward(Protocol):
    """Something that scores responses. Higher is better; the scale is the scorer's own."""

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """One finite number for each response, in order. Raises RunProblem, naming the scorer, where it has none.

        `prompts` are the corpus's prompt texts (plain requests or dialogues), `responses` texts without special
        tokens; the tokens are the policy's, EOS included where the response kept one. Scorers read what suits them.
        """
        ...


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
        from models.build import load_config

        labels = load_config(settings.model).num_labels
        if labels != 1:
            raise UsageProblem(
                f"reward model {settings.model}: it gives {labels} numbers; a reward is one.", "reward/labels"
            )


def check_scores(scores: Any, count: int, scorer: str) -> list[float]:
    """`scores` as `count` finite floats; RunProblem, naming the scorer, where they are not that."""
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError):  # whose sentence would repeat what came, which may be what was sent: a token
        raise RunProblem(
            f"{scorer}: it should return a list of {count} numbers, and something in it is none.", "reward/scores"
        ) from None
    if len(numbers) != count:
        raise RunProblem(f"{scorer}: it returned {len(numbers)} scores for {count} responses.", "reward/scores")
    for row, number in enumerate(numbers):
        if not math.isfinite(number):
            raise RunProblem(
                f"{scorer}: the score of response {row} of {count} is {number}; it should be finite.", "reward/scores"
            )
    return numbers


class TrainedReward:
    """Our reward model from its exported Hugging Face directory; it reads the policy's tokens as they are.

    The score is read at the last real token (EOS where the response kept one), the export's "reward_bias" included.
    """

    def __init__(
        self,
        directory: str,
        tokenizer: "PreTrainedTokenizerFast",
        rows_per_batch: int,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        import torch

        from models.build import load_tokenizer
        from models.scalar_head import load_scalar

        self._name = f"reward model {directory}"
        if load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
            raise UsageProblem(
                f"{self._name}: it was trained with another vocabulary than the policy's.", "reward/vocabulary"
            )
        self._model = load_scalar(directory, getattr(torch, dtype)).to(device).eval().requires_grad_(False)
        self._rows_per_batch = rows_per_batch
        self._device = device

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the texts are not read."""
        from models.scalar_head import last_token_scores

        def run(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
            return last_token_scores(self._model(tokens, mask), mask)

        sequences = [[*prompt, *response] for prompt, response in zip(prompt_tokens, response_tokens, strict=True)]
        scores = score_in_fixed_shapes(sequences, run, self._rows_per_batch, pad_id=0, device=self._device)
        return check_scores(scores, len(sequences), self._name)


class HuggingFaceReward:
    """A Hugging Face sequence classifier with one label, which reads the texts through its own tokenizer.

    The conversation is written by that tokenizer's chat template, which is then the authority on special tokens; a
    tokenizer without one gets the dialogue (or plain) text and adds its special tokens itself. What is longer than the
    model's context loses its beginning.
    """

    def __init__(
        self,
        model: str,
        template: TemplateName,
        rows_per_batch: int,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from models.build import LOAD_ERRORS, context_length, load_pretrained

        self._name = f"reward model {model}"
        classifier: Any = load_pretrained(AutoModelForSequenceClassification, model, getattr(torch, dtype))
        if classifier.config.num_labels != 1:
            raise UsageProblem(
                f"{self._name}: it gives {classifier.config.num_labels} numbers; a reward is one.", "reward/labels"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise UsageProblem(f"{self._name}: its tokenizer does not load ({error}).", "model/tokenizer") from error
        self._tokenizer.truncation_side = "left"
        own = template == "auto" and self._tokenizer.chat_template is not None
        self._template = None if own else PLAIN_TEMPLATE if template == "plain" else DIALOGUE_TEMPLATE
        limits = (context_length(classifier.config), self._tokenizer.model_max_length)  # RoBERTa's are 514 and 512
        self._longest = min(int(limit) for limit in limits if limit is not None)
        self._bias = float(getattr(classifier.config, "reward_bias", 0.0))  # of a model that this program exported
        classifier.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._model = classifier.to(device).eval().requires_grad_(False)
        self._rows_per_batch = rows_per_batch
        self._device = device

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The token ids that this model reads for each prompt with its response."""
        texts = [
            self._tokenizer.apply_chat_template(
                [*messages_of(prompt), {"role": "assistant", "content": response.strip()}],
                chat_template=self._template,
                tokenize=False,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=self._template is not None,
            truncation=True,
            max_length=self._longest,
        )
        return encoded["input_ids"]

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the policy's tokens are not read."""

        def run(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
            return self._model(input_ids=tokens, attention_mask=mask).logits[:, 0].float() + self._bias

        scores = score_in_fixed_shapes(
            self.encode(prompts, responses),
            run,
            self._rows_per_batch,
            self._tokenizer.pad_token_id,
            self._device,
            self._longest,
        )
        return check_scores(scores, len(prompts), self._name)


def score_in_fixed_shapes(
    sequences: Sequence[Sequence[int]],
    run: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]",
    rows_per_batch: int,
    pad_id: int | None,
    device: str,
    longest: int = sys.maxsize,
) -> list[float]:
    """`run(tokens, mask)` over all sequences, each in a batch whose shape its own length decides.

    A sequence of n tokens is right-padded to the next multiple of 32, or to `longest`. Its batch always has as many
    rows as `rows_per_batch` rows of 64 tokens hold; rows that nothing fills repeat the first. Without a pad id every
    sequence is a batch of its own.
    """
    import torch

    shapes: dict[int, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        width = len(sequence) if pad_id is None else min(-(-len(sequence) // WIDTH_STEP) * WIDTH_STEP, longest)
        shapes[width].append(row)
    scores = [math.nan] * len(sequences)
    with torch.inference_mode():
        for width, rows in shapes.items():
            height = 1 if pad_id is None else max(1, rows_per_batch * 64 // width)
            for start in range(0, len(rows), height):
                chosen = rows[start : start + height]
                filled = [*chosen, *[chosen[0]] * (height - len(chosen))]
                lengths = torch.tensor([[len(sequences[row])] for row in filled])
                padded = [[*sequences[row], *[pad_id or 0] * (width - len(sequences[row]))] for row in filled]
                mask = torch.arange(width)[None] < lengths
                results = run(torch.tensor(padded, device=device), mask.long().to(device))
                for row, score in zip(chosen, results.tolist(), strict=False):
                    scores[row] = score
    return scores


class FunctionReward:
    """A Python function of (prompts, responses), two lists of texts, that returns one number for each response."""

    def __init__(self, name: str) -> None:
        """`name` is 'module:function', importable from the working directory. UsageProblem where it is not there."""
        self._name = f"reward function {name}"
        module_name, _, function_name = name.partition(":")
        if "" not in sys.path:
            sys.path.append("")  # an installed command does not look in the working directory by itself
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # whatever a module of the person's does as it is imported
            reason = f"{type(error).__name__}: {error}"
            raise UsageProblem(f"{self._name}: the module cannot be imported ({reason}).", "reward/function") from error
        self._function: Callable[[list[str], list[str]], Any] = getattr(module, function_name, None)  # pyright: ignore[reportAttributeAccessIssue]
        if not callable(self._function):
            raise UsageProblem(
                f"{self._name}: the module {module_name} has no function {function_name}.", "reward/function"
            )

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the tokens are not read. RunProblem, with the place, where the function raises."""
        try:
            scores = self._function(list(prompts), list(responses))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise RunProblem(
                f"{self._name}: it raised {type(error).__name__}: {error} ({at.filename}:{at.lineno}).",
                "reward/function",
            ) from error
        return check_scores(scores, len(responses), self._name)


class HTTPReward:
    """A service: POST {"prompts": […], "responses": […]} is answered by {"scores": […]}.

    A refused or lost connection, a time-out, and the answers 429 and 5xx are tried again, after 0.5 s, 1 s, 2 s, … and
    at most 30 s, until the deadline; any other answer but 200 ends the run at once. The bearer token, where one is
    sent, is in no sentence, even if the service repeats it.
    """

    def __init__(
        self,
        url: str,
        rows_per_request: int,
        timeout_s: float,
        deadline_s: float,
        token_variable: str | None = None,
    ) -> None:
        import httpx

        self._name = f"reward service {url}"
        self._url = url
        self._rows_per_request = rows_per_request
        self._deadline_s = deadline_s
        try:
            scheme, parts = httpx.URL(url).scheme, urlsplit(url)
            has_place = bool(parts.hostname) and parts.port != 0  # `port` raises ValueError for one that cannot be
        except (httpx.InvalidURL, ValueError) as error:
            raise UsageProblem(f"{self._name}: this is no web address ({error}).", "reward/address") from error
        if scheme not in ("http", "https"):
            raise UsageProblem(f"{self._name}: the address should begin with http:// or https://.", "reward/address")
        if not has_place:
            raise UsageProblem(
                f"{self._name}: the address should name a host, as http://HOST:PORT/PATH does.", "reward/address"
            )
        self._token = None if token_variable is None else self._token_in(token_variable)
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        self._client = httpx.Client(timeout=timeout_s, headers=headers)

    def _token_in(self, variable: str) -> str:
        token = os.environ.get(variable, "").strip()  # one that comes from a file has the end of its line
        if not token:
            raise UsageProblem(
                f"{self._name}: the environment has no {variable}, which reward.token_variable names; set it where the "
                "scoring processes run.",
                "reward/token",
            )
        if not token.isascii() or not token.isprintable() or " " in token:
            raise UsageProblem(
                f"{self._name}: the value of {variable} is no bearer token: it has blanks or no ASCII.", "reward/token"
            )
        return token

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """See `Reward.score`; the tokens are not read."""
        scores: list[float] = []
        for start in range(0, len(responses), self._rows_per_request):
            chosen = slice(start, start + self._rows_per_request)
            answer = self._post({"prompts": prompts[chosen], "responses": responses[chosen]})
            scores += check_scores(answer, len(responses[chosen]), self._name)
        return scores

    def _post(self, body: dict[str, list[str]]) -> Any:
        import httpx

        give_up = time.monotonic() + self._deadline_s
        pause_s = 0.5
        while True:
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code == 200:
                    return self._scores(response)
                failure = f"it answered {response.status_code} {self._without_token(response.text)[:200]!r}"
                if response.status_code != 429 and response.status_code < 500:
                    raise RunProblem(f"{self._name}: {failure}.", "reward/service")
            except httpx.TransportError as error:
                failure = f"{type(error).__name__} {error}".strip()
            if time.monotonic() + pause_s > give_up:
                raise RunProblem(
                    f"{self._name}: no scores within {self._deadline_s:g} s; at last, {failure}.", "reward/unreachable"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    def _without_token(self, text: str) -> str:
        return text if self._token is None else text.replace(self._token, "…")

    def _scores(self, response: Any) -> Any:
        try:
            return response.json()["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunProblem(
                f'{self._name}: its answer is not JSON with a list under "scores".', "reward/service"
            ) from error
