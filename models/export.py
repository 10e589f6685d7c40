"""Hugging Face directories that transformers and vLLM load untouched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from corpus.problems import RunProblem
from models.build import context_length, load_causal_lm, load_config, load_tokenizer, match_vocabulary

logging.disable_progress_bar()  # a command line of several processes draws its own progress


def export_causal_lm(
    directory: Path,
    model: PreTrainedModel | PreTrainedConfig,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
) -> None:
    """Write config.json, model.safetensors (shards above 50 GB), the tokenizer and generation_config.json.

    `weights` are by plain Hugging Face name; `model` only gives the configuration. The generation limits are what
    a server takes for its defaults. Raises RunProblem where `weights` are not this model's.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    config = _with_tokenizer_ids(config, tokenizer)
    limits = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    write_model(directory, AutoModelForCausalLM, config, weights, dtype, limits)
    tokenizer.save_pretrained(directory)


def write_with_row_for_pad(directory_or_name: str, tokenizer_directory: str, target: Path) -> bool:
    """Write a copy of a causal language model with a row for the PAD that its tokenizer was given, where it has none.

    Returns whether it was needed. Its row is the same every time. Raises UsageProblem where the model does not load.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    if max(tokenizer.get_vocab().values()) < load_config(directory_or_name).get_text_config().vocab_size:
        return False
    model = load_causal_lm(directory_or_name)
    match_vocabulary(model, tokenizer)
    limit = context_length(model.config) or tokenizer.model_max_length
    export_causal_lm(target, model, model.state_dict(), tokenizer, max_new_tokens=limit)
    return True


def write_model(
    directory: Path,
    auto_class: Any,
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
) -> None:
    """Write configuration and weights of the architecture that `auto_class` has for `config`."""
    with torch.device("meta"):  # the names and the way to write them are all that is needed of the network
        skeleton = auto_class.from_config(config, dtype=dtype)
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    expected = skeleton.state_dict()
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in weights.items()
        if name not in tied
    }
    missing = sorted(expected.keys() - state.keys() - set(tied))
    unknown = sorted(state.keys() - expected.keys())
    misshapen = sorted(name for name in state.keys() & expected.keys() if state[name].shape != expected[name].shape)
    if missing or unknown or misshapen:
        raise RunProblem(
            f"The weights to export are not those of {type(skeleton).__name__}: "
            f"missing {missing[:3]}, unknown {unknown[:3]}, of another shape {misshapen[:3]}.",
            "model/weights",
        )
    if generation is not None:
        skeleton.generation_config = generation
    skeleton.save_pretrained(directory, state_dict=state)


def _with_tokenizer_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    config = type(config).from_dict(config.to_dict())
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config
