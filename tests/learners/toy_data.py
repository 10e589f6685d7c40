"""Small tables with a pattern to learn, over the sixteen tokens of the tests' tokenizer."""

from pathlib import Path

import numpy as np

from corpus.schemas import make_table, write_table

EOS, GOOD = 14, 3


def demonstration_rows(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """The prompt's last word decides between two responses: a pattern that a tiny model learns in a few epochs."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 13, random.integers(2, 6)).tolist() for _ in range(count)]
    return [(prompt, [1, 2, EOS] if prompt[-1] < 6 else [3, 4, EOS]) for prompt in prompts]


def write_demonstrations(path: Path, pairs) -> Path:
    count = len(pairs)
    columns = {
        "prompt_id": [str(i) for i in range(count)],
        "user_id": ["u"] * count,
        "prompt": ["p"] * count,
        "response": ["r"] * count,
        "prompt_tokens": [prompt for prompt, _ in pairs],
        "response_tokens": [response for _, response in pairs],
        "meta": [""] * count,
    }
    write_table(make_table("demonstrations", columns), path, "demonstrations")
    return path


def write_counting(path: Path) -> Path:
    """52 documents that count up from some word."""
    counting = [[*((start + np.arange(6)) % 13).tolist(), EOS] for start in range(13)] * 4
    write_table(make_table("pretraining", {"tokens": counting}), path, "pretraining")
    return path


def write_comparisons(path: Path, count: int, seed: int, ties: int = 0) -> Path:
    """A response is better the more often it says GOOD; the last `ties` rankings are all ties."""
    random = np.random.default_rng(seed)
    responses, ranks = [], []
    for i in range(count):
        k = int(random.integers(4, 7))
        of_prompt = [[*random.choice([GOOD, 5, 6], random.integers(2, 5)).tolist(), EOS] for _ in range(k)]
        goods = [response.count(GOOD) for response in of_prompt]
        ordered = sorted(set(goods), reverse=True)
        ranks.append([0] * k if i >= count - ties else [ordered.index(good) for good in goods])
        responses.append(of_prompt)
    columns = {
        "prompt_id": [str(i) for i in range(count)],
        "user_id": ["u"] * count,
        "labeler_id": ["l"] * count,
        "prompt": ["p"] * count,
        "prompt_tokens": [random.integers(7, 13, random.integers(1, 4)).tolist() for _ in range(count)],
        "responses": [["r"] * len(of_prompt) for of_prompt in responses],
        "response_tokens": responses,
        "ranks": ranks,
        "meta": [""] * count,
    }
    write_table(make_table("comparisons", columns), path, "comparisons")
    return path
