"""A tiny random Llama that vLLM serves too: heads of 32 units are the smallest that it has on CPUs."""

from typing import Any

WORDS = 97


def make_llama(seed: int, context: int) -> Any:
    """Other weights for every seed; tokens 0, 1 and 2 are PAD, EOS and BOS."""
    import torch
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
