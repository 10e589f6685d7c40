"""A tiny random Llama for vLLM's engine, and what transformers says of the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.snapshot import Snapshot, pack

WORDS = 97


def make_model(seed: int, context: int) -> Any:
    """Other weights for every seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_model(path: Path, context: int) -> Path:
    """The model of seed 0 with a tokenizer, in `path`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w3"
    )
    tokenizer.save_pretrained(path)
    make_model(0, context).save_pretrained(path)
    return path


def snapshot_of(model: Any, update: int) -> Snapshot:
    return pack(dict(model.named_parameters()), (0, update))


def reference_logprobs(model: Any, prompt: Any, response: Any, temperature: float) -> np.ndarray:
    """Of the response's tokens, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    chosen = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
