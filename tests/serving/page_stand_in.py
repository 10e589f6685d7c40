"""A service for tests of the page: the page's own routes, and /v1 routes that answer with fixed tokens, hostile ones
among them, slowly, and with each kind of trouble once.

`python tests/serving/page_stand_in.py DIRECTORY PORT` serves a made-up run, to look at the page.
"""

import asyncio
import json
import math
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from corpus.problems import UsageProblem
from corpus.schemas import make_table, write_table
from serving.page.api import page_router
from serving.page.backend import (
    CSRF_HEADER,
    SESSION_COOKIE,
    ServedLimits,
    ServedModel,
    ServedState,
    Session,
    Visitor,
    Wish,
    WishConflict,
)
from serving.page.run_view import PageRun

OPERATOR, READER = "token-of-the-operator", "token-of-a-reader"
HOSTILE = [
    "Sure",
    " ,",
    " <img",
    ' src=x onerror="window.canary=1">',
    "<script>window.canary=1</script>",
    "\n",
    "\u202eevil\u202c",
    " \x1b[31m",
    " \u00ad",
    "</div></article>",
    " javascript:window.canary=1",
    " <svg/onload=window.canary=1>",
    " <a href='data:text/html,<script>opener.canary=1</script>'>x</a>",
    " &lt;b&gt;",
    " \u05e9\u05dc\u05d5\u05dd",
    " e" + "\u0301" * 40,
]
"""Tokens of a model that means harm: markup, scripts, direction overrides, control characters, stacked accents."""

HALVES = (" \ufffd1", "\ufffd2")
"""Two tokens that are one character only together, as those of byte-level vocabularies."""

PLAIN = {
    "base": [
        " the",
        " dog",
        " ran",
        " to",
        " the",
        " river",
        " and",
        " the",
        " dog",
        " ran",
        " to",
        " the",
        " river",
        ".",
    ],
    "sft": [" okay", ",", " anna", " bakes", " bread", " in", " the", " morning", ".", " she", " likes", " it", "."],
    "reference": [" okay", ",", " anna", " bakes", " bread", " in", " the", " morning", "."],
    "policy": [
        *(" sure", ",", " anna", " bakes", " warm", " bread", " for", " the", " village", "."),
        *(" everyone", " is", " glad", *HALVES, "."),
    ],
    "policy@40": [" sure", ",", " anna", " bakes", " bread", " for", " all", "."],
}
END = "</s>"
TEXTS = {END: "", HALVES[0]: "", HALVES[1]: " \U0001f35e"}
"""Tokens whose text in a stream is not their own."""

SCORES = {"base": -1.31, "sft": 0.12, "policy": 1.27, "policy@40": 0.84, "reference": 0.05}


def vocabulary() -> list[str]:
    """All tokens; a token's id is its index."""
    words = {word for answer in PLAIN.values() for word in answer}
    return [END, *sorted(words | set(HOSTILE))]


VOCABULARY = vocabulary()


COMPARISON: dict[str, Any] = {
    "prompt": "what color is the house of omar ?",
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 32, "seed": 7},
    "answers": [
        {
            "model": "policy@40",
            "versions": ["0.40"],
            "tokens": [
                {"text": "blue", "logprob": -0.5, "reference": -1.5},
                {"text": "", "logprob": None, "reference": None},
            ],
            "finish_reason": "stop",
            "score": 1.25,
            "kl": 1.0,
        }
    ],
}
"""What a page sends to be kept."""


def text_of(tokens: list[str]) -> str:
    """The text of an answer."""
    return "".join(TEXTS.get(token, token) for token in tokens)


def logprob(model: str, token: str) -> float:
    """What the model `model` thinks of a token, nats: fixed, in (−3, 0)."""
    spread = sum(ord(character) * (index + 7) for index, character in enumerate(model + token)) % 97
    return -0.05 - 2.4 * spread / 97 if model != "reference" else -0.3 - 1.1 * spread / 97


@dataclass
class StandIn:
    """The service behind the page. Tests change what it does, and read what it was asked."""

    open: bool = False
    pause_s: float = 0.02
    """Seconds between two tokens."""

    hostile: bool = False
    """Whether `policy` answers with HOSTILE."""

    loading: dict[str, int] = field(default_factory=dict)
    """Model → how many times it says yet that it is being loaded."""

    broken: set[str] = field(default_factory=set)
    """Models whose stream ends in an error after three tokens."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of /v1/completions and /v1/score, in the order in which they came."""

    cut_off: int = 0
    """Streams that the page has left before their end."""

    rival: str | None = None
    """Who changes the wish just before the next one is written."""

    wish: Wish = field(default_factory=lambda: Wish(counter=0, pinned=None))
    names: tuple[str, ...] = ("policy", "sft", "reference", "base", "policy@20", "policy@40")
    sessions: dict[str, Visitor] = field(default_factory=dict)

    async def visitor(self, request: Request) -> Visitor | None:
        if self.open:
            return Visitor(name="anyone", scopes=frozenset({"read", "score", "operate"}), login=False)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._owner(token)
        return self.sessions.get(request.cookies.get(SESSION_COOKIE, ""))

    def _owner(self, token: str) -> Visitor | None:
        if secrets.compare_digest(token, OPERATOR):
            return Visitor(name="ann", scopes=frozenset({"read", "score", "operate"}))
        if secrets.compare_digest(token, READER):
            return Visitor(name="bob", scopes=frozenset({"read", "score"}))
        return None

    async def log_in(self, token: str) -> Session | None:
        owner = self._owner(token)
        if owner is None:
            return None
        cookie, csrf = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.sessions[cookie] = owner.model_copy(update={"csrf": csrf})
        return Session(cookie=cookie, seconds=3600, visitor=self.sessions[cookie])

    async def log_out(self, cookie: str) -> None:
        self.sessions.pop(cookie, None)

    async def state(self) -> ServedState:
        titles = {
            "policy": "the policy as it is now",
            "sft": "the supervised baseline",
            "reference": "what PPO started from, frozen",
            "base": "the base model",
        }
        models = [
            ServedModel(
                name=name,
                title=titles.get(name, f"the policy after {name.rpartition('@')[2]} updates"),
                version={"policy": "0.48"}.get(name, name.replace("policy@", "0.")),
                loaded=name in ("policy", "sft"),
            )
            for name in self.names
        ]
        return ServedState(models=models, wish=self.wish, limits=ServedLimits(max_tokens=512, prompt_tokens=512))

    async def want(self, pinned: str | None, seen: int, who: str) -> Wish:
        if pinned is not None and pinned not in self.names:
            raise UsageProblem(
                f"There is no model {pinned!r}; policy can be held at policy@20 or policy@40.", "data/row"
            )
        if self.rival is not None:
            self.wish = self.wish.model_copy(update={"counter": self.wish.counter + 1, "who": self.rival})
            self.rival = None
        if seen != self.wish.counter:
            raise WishConflict(f"{self.wish.who} has changed this since you looked; look again.")
        self.wish = Wish(counter=seen + 1, pinned=pinned, who=who, when="2026-11-28T01:30:00+00:00")
        return self.wish

    def answer(self, model: str) -> list[str]:
        return HOSTILE if model == "policy" and self.hostile else PLAIN.get(model, PLAIN["policy@40"])


def application(run: PageRun, service: StandIn) -> FastAPI:
    """The page and the API of `service`."""
    app = FastAPI(openapi_url=None)
    app.include_router(page_router(run, service))

    async def refused(request: Request) -> Response | None:
        visitor = await service.visitor(request)
        if visitor is None:
            return error(401, "invalid_token", "Log in with a token.")
        if visitor.csrf is not None and request.headers.get(CSRF_HEADER) != visitor.csrf:
            return error(403, "invalid_csrf", "The CSRF token is missing.")
        return None

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        if (refusal := await refused(request)) is not None:
            return refusal
        body = await request.json()
        service.asked.append(body)
        model = body["model"]
        if service.loading.get(model, 0) > 0:
            service.loading[model] -= 1
            return error(503, "model_loading", f"{model} is being loaded.", {"retry-after": "1"})
        if body.get("echo"):
            texts = [VOCABULARY[token] if token < len(VOCABULARY) else "?" for token in body["prompt"]]
            values = [None, *(logprob(model, text) for text in texts[1:])]
            choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": values, "tokens": texts}}
            return JSONResponse({"choices": [choice]})
        headers = {"x-amenable-version": "0.48"}
        return StreamingResponse(stream(service, model, body), media_type="text/event-stream", headers=headers)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        if (refusal := await refused(request)) is not None:
            return refusal
        body = await request.json()
        service.asked.append(body)
        response = body["pairs"][0]["response"]
        found = next((name for name in PLAIN if text_of(service.answer(name)) == response), "sft")
        return JSONResponse({"scores": [SCORES[found]], "calibration": "demonstrations average 0"})

    return app


async def stream(service: StandIn, model: str, body: dict[str, Any]) -> AsyncIterator[str]:
    """Server-sent events as vLLM sends them: one token a chunk, a character over two, the end without text."""
    finished = False
    try:
        tokens = service.answer(model)[: body["max_tokens"]]
        whole = tokens if len(tokens) < len(service.answer(model)) else [*tokens, END]
        for index, token in enumerate(whole):
            await asyncio.sleep(service.pause_s)
            if model in service.broken and index == 3:
                yield f"data: {json.dumps({'error': {'message': 'The engine has died.', 'code': 500}})}\n\n"
                finished = True
                return
            last = index == len(whole) - 1
            yield event(model, token, last, len(tokens) == len(whole))
        yield "data: [DONE]\n\n"
        finished = True
    finally:
        service.cut_off += not finished


def event(model: str, token: str, last: bool, cut: bool) -> str:
    choice: dict[str, Any] = {
        "index": 0,
        "text": TEXTS.get(token, token),
        "token_ids": [VOCABULARY.index(token)],
        "logprobs": {"tokens": [token], "token_logprobs": [logprob(model, token)]},
        "finish_reason": ("length" if cut else "stop") if last else None,
    }
    chunk: dict[str, Any] = {"object": "text_completion", "model": model, "choices": [choice]}
    if last:
        spans = ["0.47", "0.48"] if model == "policy" else [model.replace("policy@", "0.")]
        chunk["amenable"] = {"versions": [{"version": span} for span in spans]}
    return f"data: {json.dumps(chunk)}\n\n"


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    content = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return JSONResponse(content, status_code=status, headers=headers)


def expected_kl(model: str, tokens: list[str]) -> float:
    """The sample of the KL that the page should show for an answer that ended by itself, nats."""
    return sum(logprob(model, token) - logprob("reference", token) for token in [*tokens, END])


def made_up_run(directory: Path) -> PageRun:
    """A run's files as far as the page reads them: recipe, tokenizer of bytes, prompts, curves. All invented."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text("name: made-up\ncorpus: null\n")
    _write_tokenizer(directory / "data" / "tokenizer")
    prompts = [
        "write 2 sentences about anna . mention bread .",
        "name 3 animals without lions .",
        "what color is the house of omar ?",
        "sum up : the dog ran to the river and came back wet .",
        "<b>bold</b> \u202eprompt",
    ]
    columns = {
        "prompt_id": [f"heldout-{index}" for index in range(len(prompts))],
        "user_id": ["someone"] * len(prompts),
        "prompt": prompts,
        "prompt_tokens": [[2, 3]] * len(prompts),
        "meta": ["{}"] * len(prompts),
    }
    write_table(make_table("prompts", columns), directory / "data" / "prompts-heldout.parquet", "prompts")
    write_metrics(directory, 48)
    return PageRun(directory, "made-up")


def _write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = {"<eos>": 0, "<pad>": 1, **{character: 2 + index for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}question : {{ message['content'] }} answer :{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_metrics(directory: Path, updates: int) -> None:
    """metrics.jsonl of PPO and of the reward model."""
    ppo, rm = directory / "round-01" / "ppo", directory / "round-01" / "rm"
    lines = []
    for step in range(1, updates + 1):
        gained = 1 - math.exp(-step / 18)
        wiggle = math.sin(step * 2.1) * 0.06
        line = {
            "step": step,
            "time": 1.7e9 + step,
            "objective/scores": -0.1 + 1.1 * gained + wiggle,
            "objective/scores_std": 0.9 + wiggle,
            "objective/rlhf_reward": -0.1 + 0.95 * gained + wiggle,
            "objective/non_score_reward": -0.15 * gained,
            "objective/kl": 2.9 * gained + abs(wiggle),
            "objective/kl_coefficient": 0.05,
            "objective/entropy": 9 - 3 * gained,
            "loss/ptx": 0.76 + wiggle / 10,
            "policy/entropy_avg": 0.7 - 0.2 * gained,
            "response/length_mean": 11 + 2 * gained + wiggle,
            "response/length_std": 3 + wiggle,
            "response/truncated_fraction": 0.02 * (1 - gained),
            "val/num_eos_tokens": 63.0,
        }
        lines.append(json.dumps(line))
    ppo.mkdir(parents=True, exist_ok=True)
    (ppo / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rm.mkdir(parents=True, exist_ok=True)
    accuracy = [
        {"step": step, "time": step, "loss": 0.69 - step / 400, "valid/accuracy": 0.5 + step / 300}
        for step in range(1, 60)
    ]
    (rm / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in accuracy))
    (rm / "stage.json").write_text("{}")


if __name__ == "__main__":
    import sys

    import uvicorn

    page_run = made_up_run(Path(sys.argv[1]))
    uvicorn.run(application(page_run, StandIn(open=True, pause_s=0.15)), port=int(sys.argv[2]))
