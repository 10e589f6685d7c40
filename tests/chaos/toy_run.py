"""A run directory as the stages before PPO leave it, with a policy of two layers."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corpus.schemas import make_table, write_table
from models.build import TinyLlamaSettings, tiny_llama
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel

WORDS, PAD, EOS = 16, 13, 14
SHAPE = TinyLlamaSettings(hidden_size=64, layers=2, heads=2, mlp_size=16, context_length=32)
"""Heads of 32 units are the smallest that vLLM has on CPUs."""


def write_given(root: Path) -> Path:
    """What the PPO stage reads of a run: data, base model, reward model and the policy that it starts from."""
    tokenizer = _tokenizer(root / "data" / "tokenizer")
    first = root / "round-01"

    def llama(seed: int) -> Any:
        return tiny_llama(SHAPE, WORDS, PAD, None, EOS, seed=seed)

    for directory in (root / "base" / "export", first / "ppo-init" / "export"):
        directory.mkdir(parents=True)
        export_causal_lm(directory, llama(0), llama(0).state_dict(), tokenizer, max_new_tokens=5)
    (first / "rm" / "export").mkdir(parents=True)
    ScalarHeadModel(llama(1).model, seed=2).save_reward_model(first / "rm" / "export", tokenizer, bias=0.0)
    random = np.random.default_rng(0)
    tokens = [random.integers(0, 13, random.integers(1, 6)).tolist() for _ in range(12)]
    columns = {"prompt_id": [f"p{i}" for i in range(12)], "user_id": ["u"] * 12, "prompt": ["?"] * 12}
    prompts = make_table("prompts", {**columns, "prompt_tokens": tokens, "meta": [""] * 12})
    for name in ("prompts-ppo", "prompts-heldout"):
        write_table(prompts, root / "data" / f"{name}.parquet", "prompts")
    counting = [[*((start + np.arange(6)) % 13).tolist(), EOS] for start in range(13)] * 4
    write_table(
        make_table("pretraining", {"tokens": counting}), root / "data" / "pretraining-train.parquet", "pretraining"
    )
    return root


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Tokens 0 to 15: w0 to w12, then <pad> 13, <eos> 14, <unk> 15."""
    words = {f"w{i}": i for i in range(13)} | {"<pad>": PAD, "<eos>": EOS, "<unk>": 15}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
