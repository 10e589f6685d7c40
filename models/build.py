"""Make or load the networks and tokenizers that are trained: nothing here runs code from a checkpoint."""

import os
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from corpus.problems import UsageProblem
from corpus.storage import one_line
from models.settings import TinyLlamaSettings

logging.disable_progress_bar()  # a command line of several processes draws its own progress
getLogger("huggingface_hub").handlers.clear()  # its lines go to the root's handler too, and would be told twice

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for a directory that is missing, truncated, of an unknown type or of the wrong shapes."""


def tiny_llama(
    settings: TinyLlamaSettings, vocab_size: int, pad_id: int, bos_id: int | None, eos_id: int, seed: int
) -> LlamaForCausalLM:
    """A float32 Llama with seeded random weights; the caller's random state is left as it was.

    Raises UsageProblem where PAD is EOS, because the model would then never learn to stop.
    """
    if pad_id == eos_id:
        raise UsageProblem(
            f"PAD and EOS are the same token ({eos_id}); they must differ or the model never stops.", "model/tokenizer"
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads or settings.heads,
        max_position_embeddings=settings.context_length,
        initializer_range=settings.initial_std,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=settings.tied_embeddings,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_causal_lm(directory_or_name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a local directory or the Hub, on the CPU, with dropout as its checkpoint sets it.

    Only safetensors are read and no code of the checkpoint is run. Raises UsageProblem where it does not load, or
    where the checkpoint lacks weights (transformers would fill them with random numbers).
    """
    return load_pretrained(AutoModelForCausalLM, directory_or_name, dtype)


def check_causal_lm(directory_or_name: str, context_tokens: int) -> None:
    """Raises UsageProblem where a base model could not serve, as far as its configuration and tokenizer tell."""
    config = load_config(directory_or_name)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageProblem(
            f"Model {directory_or_name!r} is of type {config.model_type}, not a causal language model.", "model/kind"
        )
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UsageProblem(
            f"Model {directory_or_name!r} is of type {config.model_type}, for which Transformers has no sequence "
            "classifier: a reward model made from it could not be saved. Give a model of another type.",
            "model/kind",
        )
    longest = context_length(config)
    if longest is not None and longest < context_tokens:
        raise UsageProblem(
            f"Model {directory_or_name!r} reads at most {longest} tokens; the recipe asks for {context_tokens}: lower "
            "tokens.context_tokens and the stages' context_length.",
            "recipe/lengths",
        )
    check_weight_files(directory_or_name)
    tokenizer = load_tokenizer(directory_or_name)
    rows, tokens = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    if tokens > rows + (tokenizer.pad_token_id == rows):
        raise UsageProblem(
            f"The tokenizer of {directory_or_name!r} has {tokens} tokens and the model has rows for {rows}; they do "
            "not belong together.",
            "model/tokenizer",
        )


def load_config(directory_or_name: str) -> PreTrainedConfig:
    """The configuration of a model in a local directory or on the Hub. Raises UsageProblem where it does not load."""
    _require_directory(directory_or_name, "model")
    try:
        return AutoConfig.from_pretrained(directory_or_name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UsageProblem(f"Model {directory_or_name!r} does not load: {_first_line(error)}", "model/load") from error


def load_pretrained(auto_class: Any, directory_or_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """`auto_class.from_pretrained` with the rules of `load_causal_lm`."""
    _require_directory(directory_or_name, "model")
    try:
        model, loading = auto_class.from_pretrained(
            directory_or_name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise UsageProblem(f"Model {directory_or_name!r} does not load: {_first_line(error)}", "model/load") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UsageProblem(
            f"Model {directory_or_name!r} lacks {len(missing)} of the weights that {auto_class.__name__} needs, such "
            f"as {missing[0]}; give a complete checkpoint.",
            "model/weights",
        )
    return model


def load_tokenizer(directory_or_name: str, pad_token: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose PAD differs from its EOS, padding on the right.

    `pad_token` names the pad token, adding it to the vocabulary where it is new. Where the tokenizer has none and none
    is named, `<|pad|>` is added: `match_vocabulary` then gives the model a row for it.
    Raises UsageProblem where it does not load, is not a fast tokenizer, has no EOS, or where PAD is EOS.
    """
    _require_directory(directory_or_name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory_or_name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        local = Path(directory_or_name)
        missing = ", and has no tokenizer.json" if local.is_dir() and not (local / "tokenizer.json").exists() else ""
        raise UsageProblem(
            f"Tokenizer {directory_or_name!r} does not load{missing}: {_first_line(error)}", "model/tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageProblem(
            f"Tokenizer {directory_or_name!r} is not a fast tokenizer (it needs a tokenizer.json).", "model/tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UsageProblem(
            f"Tokenizer {directory_or_name!r} has no EOS token, so a response could never end.", "model/tokenizer"
        )
    if pad_token is not None or tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": pad_token or "<|pad|>"})
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageProblem(
            f"Tokenizer {directory_or_name!r} pads with its EOS token {tokenizer.eos_token!r}; "
            "give it another pad_token in its tokenizer_config.json, or the model never learns to stop.",
            "model/tokenizer",
        )
    tokenizer.padding_side = "right"
    return tokenizer


def match_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the model a row for a pad token that the tokenizer added, and the tokenizer's special ids.

    A model may have more rows than the tokenizer has tokens (padded vocabularies are common). Raises UsageProblem
    where the tokenizer has tokens other than an added PAD for which the model has no row.
    """
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        if tokens > rows + 1 or tokenizer.pad_token_id != rows:
            raise UsageProblem(
                f"The tokenizer has {tokens} tokens and the model has rows for {rows}; they do not belong together.",
                "model/tokenizer",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # Transformers draws the new row around the mean of the others
            model.resize_token_embeddings(tokens)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model of this configuration can read, in tokens; none where it has no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def set_residual_dropout(model: PreTrainedModel, p: float) -> None:
    """Make residual dropout with probability `p` the only dropout that `model` has while it is in training mode.

    It falls on what each attention and MLP block adds to the residual stream, as in GPT (`resid_pdrop`; InstructGPT
    appendix C.1 uses 0.2 for SFT). Transformers' Llama has none, so it is put there with hooks; a second call replaces
    the first, and 0 turns every dropout of any model off, as PPO needs. The dropout that the architecture itself
    brings (of attention weights or embeddings) is set to 0. Raises UsageProblem where `p` is above 0 and the blocks
    of this architecture are not known.
    """
    for handle in model.__dict__.pop("_residual_dropout_hooks", []):
        handle.remove()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "hidden_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if p == 0:
        return

    def drop(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    hooks = [block.register_forward_hook(drop) for block in _residual_blocks(model)]
    model.__dict__["_residual_dropout_hooks"] = hooks


def _residual_blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules whose outputs are added to the residual stream: two in each decoder layer."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    for layer in next(stacks, ()):
        children = dict(layer.named_children())
        attention = [children[name] for name in ("self_attn", "attn", "attention") if name in children]
        mlp = [children[name] for name in ("mlp", "feed_forward", "fc2") if name in children]
        if len(attention) != 1 or len(mlp) != 1:
            raise UsageProblem(
                f"Residual dropout is not known for {type(model).__name__}; set the dropout of supervised stages to 0.",
                "model/kind",
            )
        yield from (attention[0], mlp[0])


def check_weight_files(directory_or_name: str) -> None:
    """Of a local directory: there are safetensors files, and each is as long as its header says; else UsageProblem."""
    directory = Path(directory_or_name)
    if not directory.is_dir():
        return
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UsageProblem(
            f"Model {directory_or_name!r} has no weights: there is no .safetensors file in it.", "model/weights"
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UsageProblem(
                f"Model {directory_or_name!r}: {file.name} is damaged ({_first_line(error)}).", "model/weights"
            ) from error


def _require_directory(directory_or_name: str, what: str) -> None:
    looks_local = directory_or_name.startswith((".", "~", os.sep)) or directory_or_name.count("/") > 1
    if looks_local and not Path(directory_or_name).is_dir():
        raise UsageProblem(f"The {what} directory {directory_or_name!r} does not exist.", "model/not-found")


def _first_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return one_line(error) if first.endswith(":") else first  # a list follows, without which the line says nothing
