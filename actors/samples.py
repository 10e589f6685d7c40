"""Samples outside PPO: the requests of a batch of prompts, and the samples table that their completions make."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from actors.rollout_engine import Completion, Request
from actors.settings import SamplingSettings
from corpus.schemas import make_table
from corpus.templates import decode_responses


def sample_requests(prompts: pa.Table, samples: int, sampling: SamplingSettings, seed: int) -> list[Request]:
    """`samples` requests for each row of a prompts table, prompt by prompt."""
    ids, tokens = prompts["prompt_id"].to_pylist(), prompts["prompt_tokens"].to_pylist()
    return [
        Request(
            f"{row}/{sample}",
            tokens[row],
            sampling.max_response_tokens,
            sampling.temperature,
            seed=sample_seed(seed, ids[row], sample),
            top_p=sampling.top_p,
        )
        for row in range(len(ids))
        for sample in range(samples)
    ]


def samples_table(prompts: pa.Table, samples: int, completions: Sequence[Completion], tokenizer: Any) -> pa.Table:
    """The samples table of the completions of `sample_requests`, in their order."""
    ids, tokens = prompts["prompt_id"].to_pylist(), prompts["prompt_tokens"].to_pylist()
    rows = [(row, sample) for row in range(len(ids)) for sample in range(samples)]
    return make_table(
        "samples",
        {
            "prompt_id": [ids[row] for row, _ in rows],
            "sample": [sample for _, sample in rows],
            "prompt_tokens": [tokens[row] for row, _ in rows],
            "response_tokens": [completion.tokens for completion in completions],
            "response": decode_responses(tokenizer, [completion.tokens for completion in completions]),
            "logprobs": [completion.logprobs for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
        },
    )


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one sample outside PPO: a 63-bit hash of (seed, prompt, sample)."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
