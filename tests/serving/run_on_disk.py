"""A run's directory as a service finds it: stages with their records, tiny models, published snapshots."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests import toy_llama
from tests.toy_llama import WORDS

CONTEXT = 64


def commit(stage: Path, values: dict[str, Any] | None = None) -> None:
    """Write stage.json of all files that are in `stage` now."""
    files = {
        path.relative_to(stage).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(stage.rglob("*"))
        if path.is_file() and path.name != "stage.json"
    }
    (stage / "stage.json").write_text(json.dumps({"files": files, "values": values or {}}))


def write_weights(directory: Path, content: bytes) -> None:
    """A directory that looks like a Hugging Face one; its weights are `content`."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"vocab_size": WORDS, "max_position_embeddings": CONTEXT}))
    (directory / "model.safetensors").write_bytes(content)


def write_recipe(root: Path, **serving: Any) -> None:
    """recipe.yaml with what a service reads of it."""
    root.mkdir(parents=True, exist_ok=True)
    tokens = {"max_prompt_tokens": 40, "max_response_tokens": 24, "context_tokens": CONTEXT}
    content = {
        "name": "toy",
        "corpus": None,
        "model": {"base": None},
        "tokens": tokens,
        "sampling": {"max_response_tokens": 24},
        "serving": serving,
    }
    (root / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML


def make_llama(seed: int) -> Any:
    """Other weights for every seed."""
    return toy_llama.make_llama(seed, CONTEXT)


def make_tokenizer() -> Any:
    """PAD, EOS, BOS and unknown are the first four tokens, then come w4 to w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from corpus.templates import DIALOGUE_TEMPLATE

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = {word: token for token, word in enumerate([*special, *(f"w{n}" for n in range(4, WORDS))])}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = DIALOGUE_TEMPLATE
    return tokenizer


def write_run(root: Path, **serving: Any) -> Path:
    """A run whose PPO is under way: base, sft, reward model and reference are done, nothing is published yet."""
    from models.scalar_head import ScalarHeadModel

    write_recipe(root, **serving)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(root / "data" / "tokenizer")
    first = root / "round-01"
    for seed, stage, name in (
        (10, root / "base", "export"),
        (11, root / "sft", "epoch-01"),
        (12, first / "ppo-init", "export"),
    ):
        make_llama(seed).save_pretrained(stage / name)
        tokenizer.save_pretrained(stage / name)
    commit(root / "base")
    commit(root / "sft", {"exports": [{"directory": "epoch-01", "valid_loss": 1.0}]})
    commit(first / "ppo-init")
    (first / "rm" / "export").mkdir(parents=True)
    ScalarHeadModel(make_llama(13).model, seed=2).save_reward_model(first / "rm" / "export", tokenizer, bias=0.25)
    commit(first / "rm")
    return root


def publish(root: Path, update: int, seed: int, attempt: int = 0, kept: int = 3) -> None:
    """Publish the weights of `seed` as (attempt, update)."""
    from actors.published import PUBLISHED, PublishedFiles
    from models.snapshot import pack

    snapshot = pack(dict(make_llama(seed).named_parameters()), (attempt, update))
    PublishedFiles(root / PUBLISHED, "toy", kept).save(snapshot)


def finish_ppo(root: Path, seed: int) -> None:
    """PPO is done: policy and EMA are exported."""
    stage = root / "round-01" / "ppo"
    for offset, name in enumerate(("policy", "ema")):
        make_llama(seed + offset).save_pretrained(stage / name)
        make_tokenizer().save_pretrained(stage / name)
    commit(stage)


def alive(pid: int) -> bool:
    """Whether there is a process that is not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Processes that `pid` and its children have started."""
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry), *descendants(int(entry))]
    return found
