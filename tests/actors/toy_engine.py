"""A tiny random Llama for vLLM's engine, and what transformers says of the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.snapshot import Snapshot, pack
from tests.toy_llama import WORDS, make_llama


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
    make_llama(0, context).save_pretrained(path)
    return path


def snapshot_of(model: Any, update: int) -> Snapshot:
    return pack(dict(model.named_parameters()), (0, update))


def reference_logprobs(model: Any, prompt: Any, response: Any, temperature: float) -> np.ndarray:
    """Of the response's tokens, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    chosen = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
