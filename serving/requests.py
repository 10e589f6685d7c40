"""What a request may ask for: bodies checked against the limits and reduced to the fields that the service supports.

Pure functions from a parsed body to the body that an engine is given. A field that is not listed is refused, not
passed on: vLLM's requests have fields that reach deep into an engine (weights of other adapters, transfers of keys and
values, templates that are programs).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving.errors import ApiError, bad_request
from serving.names import POLICY
from serving.settings import Limits

_SAMPLING = frozenset(
    {
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
    }
)
_SHARED = _SAMPLING | {"model", "n", "stop", "stream", "stream_options", "return_token_ids", "logprobs", "max_tokens"}
_COMPLETION = _SHARED | {"prompt", "echo", "add_special_tokens", "return_tokens_as_token_ids"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
_TOKENIZE = frozenset(
    {"model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"}
)
_DETOKENIZE = frozenset({"model", "tokens"})
_UNREAD = frozenset({"user", "metadata", "store", "service_tier"})
"""Fields of OpenAI's API that ask for nothing here, and are left out."""

_FLAGS = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "echo",
        "ignore_eos",
        "include_stop_str_in_output",
        "return_token_ids",
        "return_token_strs",
        "return_tokens_as_token_ids",
        "skip_special_tokens",
        "stream",
    }
)
_RANGES: dict[str, tuple[float, float]] = {
    "frequency_penalty": (-2, 2),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
    "temperature": (0, 10),
    "top_p": (1e-6, 1),
}
_WHOLE_RANGES: dict[str, tuple[int, int]] = {"seed": (0, 2**63 - 1), "top_k": (-1, 1 << 20)}
"""Fields of vLLM whose limits are in the deep of it, where a number that is too large ends in an internal error."""

LONGEST_STOP = 64
"""Characters of a stop string."""

_ROLES = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True)
class Bounds:
    """The limits as they are for the models of one run."""

    limits: Limits
    context_tokens: int
    """Prompt and response together."""
    prompt_tokens: int
    max_tokens: int
    vocabulary: int


@dataclass(frozen=True)
class Asked:
    """A request that may go to an engine: its model, the body to pass on, choices of a prompt, and whether it
    streams."""

    model: str
    body: bytes
    n: int = 1
    stream: bool = False


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError (400) for anything else."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits, lists 10,000 deep
        raise bad_request("The body should be a JSON object, in UTF-8.") from None
    if not isinstance(content, dict):
        raise bad_request("The body should be a JSON object.")
    return content


def completion(content: dict[str, Any], bounds: Bounds) -> Asked:
    """A body of /v1/completions."""
    body = _known(content, _COMPLETION)
    prompts = _prompts(body.get("prompt"), bounds)
    n = _sampling(body, bounds)
    _sequences(prompts, n, bounds)
    body.setdefault("max_tokens", min(16, bounds.max_tokens))
    _at_most(body, "max_tokens", bounds.max_tokens, least=0 if body.get("echo") is True else 1)
    _at_most(body, "logprobs", bounds.limits.logprobs, least=0)
    return _asked(body, n)


def chat(content: dict[str, Any], bounds: Bounds) -> Asked:
    """A body of /v1/chat/completions."""
    body = _known(content, _CHAT)
    _messages(body.get("messages"))
    n = _sampling(body, bounds)
    _sequences(1, n, bounds)
    for name in ("max_tokens", "max_completion_tokens"):
        _at_most(body, name, bounds.max_tokens, least=1)
    if "max_completion_tokens" not in body:
        body.setdefault("max_tokens", bounds.max_tokens)
    if not isinstance(body.get("logprobs", False), bool):
        raise bad_request("logprobs should be true or false in a chat; top_logprobs says how many.", "logprobs")
    _at_most(body, "top_logprobs", bounds.limits.logprobs, least=0)
    return _asked(body, n)


def tokenize(content: dict[str, Any], bounds: Bounds) -> Asked:
    """A body of /tokenize."""
    body = _known(content, _TOKENIZE)
    if "messages" in body:
        _messages(body["messages"])
        if "prompt" in body:
            raise bad_request("Give prompt or messages, not both.", "prompt")
    elif not isinstance(body.get("prompt"), str):
        raise bad_request("prompt should be a text.", "prompt")
    return _asked(body, 1)


def detokenize(content: dict[str, Any], bounds: Bounds) -> Asked:
    """A body of /detokenize."""
    body = _known(content, _DETOKENIZE)
    tokens = body.get("tokens", [])
    if not _is_tokens(tokens):
        raise bad_request("tokens should be a list of token ids.", "tokens")
    _tokens(tokens, bounds.context_tokens, bounds, "tokens")
    return _asked(body, 1)


CHECKS: dict[str, Callable[[dict[str, Any], Bounds], Asked]] = {
    "/v1/completions": completion,
    "/v1/chat/completions": chat,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
"""By path: what checks its bodies."""


@dataclass(frozen=True)
class Lists:
    """A body of /v1/score: for each prompt its responses with whether each came to its own end, and whether the
    request gave pairs."""

    items: list[tuple[str, list[tuple[str, bool]]]]
    pairs: bool

    @property
    def responses(self) -> int:
        """How many there are in all."""
        return sum(len(responses) for _, responses in self.items)


def score(content: dict[str, Any], limits: Limits) -> Lists:
    """A body of /v1/score: {"model": "rm", "pairs": [{"prompt", "response"}]} or {"lists": [{"prompt", "responses"}]}.

    "finished": false beside a response says that it was cut, so that it has no end-of-text. Raises ApiError (400)."""
    body = _known(content, frozenset({"model", "pairs", "lists"}))
    if body.get("model", "rm") != "rm":
        raise ApiError(404, "model_not_found", "The model that scores is called rm.", "model")
    if ("pairs" in body) == ("lists" in body):
        raise bad_request("Give pairs or lists, one of them.")
    key = "pairs" if "pairs" in body else "lists"
    given = body[key]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise bad_request(f"{key} should be a list of objects, not empty.", key)
    items = [_scored(each, key) for each in given]
    found = Lists(items, key == "pairs")
    if found.responses > limits.score_pairs:
        raise bad_request(f"{found.responses} responses are more than the {limits.score_pairs} of one request.", key)
    return found


def _scored(each: dict[str, Any], key: str) -> tuple[str, list[tuple[str, bool]]]:
    name = "response" if key == "pairs" else "responses"
    strange = sorted(set(each) - {"prompt", name, "finished"})
    if strange:
        raise bad_request(f"An object of {key} has an unknown field {strange[0][:40]!r}.", key)
    responses = [each.get(name)] if key == "pairs" else each.get(name)
    if not isinstance(each.get("prompt"), str) or not isinstance(responses, list) or not responses:
        raise bad_request(f"An object of {key} should have a prompt and {name}.", key)
    finished = each.get("finished", [True] * len(responses) if key == "lists" else True)
    flags = [finished] if key == "pairs" else finished
    if not isinstance(flags, list) or len(flags) != len(responses) or not all(isinstance(f, bool) for f in flags):
        raise bad_request("finished should be true or false for every response.", key)
    texts = [response for response in responses if isinstance(response, str)]
    if len(texts) != len(responses):
        raise bad_request("Prompts and responses should be texts.", key)
    try:
        "".join([each["prompt"], *texts]).encode()
    except UnicodeEncodeError:
        raise bad_request("A prompt or response has half a surrogate pair, which is no text.", key) from None
    return each["prompt"], list(zip(texts, flags, strict=True))


def _known(content: dict[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """The fields that say something. Raises ApiError for one that is not supported."""
    body = {name: value for name, value in content.items() if value is not None and name not in _UNREAD}
    strange = sorted(set(body) - allowed)
    if strange:
        raise bad_request(f"{strange[0][:60]!r} is not a field that this service supports.", strange[0][:60])
    if not isinstance(body.get("model", ""), str):
        raise bad_request("model should be a name.", "model")
    for name in sorted(_FLAGS & set(body)):
        if not isinstance(body[name], bool):
            raise bad_request(f"{name} should be true or false.", name)
    return body


def _asked(body: dict[str, Any], n: int) -> Asked:
    model, stream = body.get("model", POLICY), body.get("stream", False)
    try:
        passed = json.dumps({**body, "model": model}, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # NaN, which JSON does not have; half a surrogate pair, which is no text
        raise bad_request("The body holds a number or a text that JSON has no word for.") from None
    return Asked(model, passed, n, stream)


def _sampling(body: dict[str, Any], bounds: Bounds) -> int:
    _at_most(body, "n", bounds.limits.n, least=1)
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise bad_request("stop should be a text or a list of texts, none of them empty.", "stop")
    if len(stops) > bounds.limits.stop:
        raise bad_request(f"{len(stops)} stop strings are more than the {bounds.limits.stop} allowed.", "stop")
    if any(len(each) > LONGEST_STOP for each in stops):
        raise bad_request(f"A stop string is longer than {LONGEST_STOP} characters.", "stop")
    tokens = body.get("stop_token_ids", [])
    if tokens and not _is_tokens(tokens):
        raise bad_request("stop_token_ids should be a list of token ids.", "stop_token_ids")
    if tokens:
        _tokens(tokens, 16, bounds, "stop_token_ids")
    _at_most(body, "min_tokens", bounds.max_tokens, least=0)
    for name, (whole_least, whole_most) in _WHOLE_RANGES.items():
        _at_most(body, name, whole_most, whole_least)
    for name, (least, most) in _RANGES.items():
        value = body.get(name, most)
        if type(value) not in (int, float) or not least <= value <= most:
            raise bad_request(f"{name} should be a number from {least:g} to {most:g}.", name)
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "continuous_usage_stats"}:
        raise bad_request("stream_options has include_usage and continuous_usage_stats.", "stream_options")
    if not all(isinstance(value, bool) for value in options.values()) or (options and not body.get("stream")):
        raise bad_request("stream_options are true or false, and for streams.", "stream_options")
    return body.get("n", 1)


def _sequences(prompts: int, n: int, bounds: Bounds) -> None:
    if prompts * n > bounds.limits.sequences:
        raise bad_request(
            f"{prompts} prompts times n = {n} are more than the {bounds.limits.sequences} sequences of one request.",
            "n",
        )


def _prompts(prompt: Any, bounds: Bounds) -> int:
    """How many prompts there are: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif _is_tokens(prompt):
        prompts = [prompt]
    elif isinstance(prompt, list):
        prompts = prompt
    else:
        raise bad_request("prompt should be a text, a list of token ids, or a list of either.", "prompt")
    texts = all(isinstance(each, str) for each in prompts)
    if not prompts or not (texts or all(_is_tokens(each) for each in prompts)) or not all(prompts):
        raise bad_request("prompt should be texts or lists of token ids, none of them empty.", "prompt")
    if len(prompts) > bounds.limits.prompts:
        raise bad_request(f"{len(prompts)} prompts are more than the {bounds.limits.prompts} of one request.", "prompt")
    if not texts:
        for each in prompts:
            _tokens(each, bounds.prompt_tokens, bounds, "prompt")
    return len(prompts)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _tokens(tokens: list[int], most: int, bounds: Bounds, param: str) -> None:
    if len(tokens) > most:
        raise bad_request(f"{len(tokens)} tokens are more than the {most} allowed here.", param)
    if not all(0 <= token < bounds.vocabulary for token in tokens):
        raise bad_request(f"A token id is not in the vocabulary, 0 to {bounds.vocabulary - 1}.", param)


def _messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages should be a list of objects with role and content, not empty.", "messages")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES or set(message) - {"role", "content"}:
            raise bad_request(f"A message has a role ({', '.join(sorted(_ROLES))}) and a content.", "messages")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = (isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text" for part in parts)
        if not all(texts) or not all(isinstance(part["text"], str) for part in parts):
            raise bad_request("A message's content should be text.", "messages")


def _at_most(body: dict[str, Any], name: str, most: int, least: int) -> None:
    if name not in body:
        return
    value = body[name]
    if type(value) is not int:
        raise bad_request(f"{name} should be a whole number.", name)
    if not least <= value <= most:
        raise bad_request(f"{name} {value if abs(value) < 10**9 else ''} should be {least} to {most}.", name)
