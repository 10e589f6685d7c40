"""A base model and a reward model of other makers, and a reward service, each through a whole run on files."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
WORDS = ["red", "green", "blue", "grey", "pink", "teal"]
SETTINGS = """
name: foreign
corpus: {path: comparisons.jsonl, held_out_fraction: 0.3}
tokens: {max_prompt_tokens: 48, max_response_tokens: 24, context_tokens: 72}
model: {base: gpt2}
sampling: {max_response_tokens: 12}
rollouts: {max_concurrent: 32, kv_cache_mib: 32}
sft: {epochs: 1, batch_size: 8, context_length: 72, residual_dropout: 0.1, optimizer: {peak_lr: 1.0e-3}}
rm: {batch_prompts: 8, optimizer: {peak_lr: 1.0e-3}}
select_sft: {prompts: 8}
ppo_init: {epochs: 1, batch_size: 8, context_length: 72, optimizer: {peak_lr: 1.0e-3}}
reward: {kind: huggingface, model: judge}
ppo:
  {updates: 2, batch_size: 16, minibatches: 2, chunk_size: 8, ptx_coefficient: 1.0, ptx_per_episode: 1,
   evaluate_every: 2, evaluation_prompts: 4, checkpoint_every: 2}
evaluation: {prompts: 8, samples_per_prompt: 1, pretraining_documents: 8}
"""


def write_tokenizer(directory: Path, special: dict[str, str], size: int) -> int:
    """A byte-level tokenizer, saved in `directory`; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose tokenizer has no PAD, a BERT judge with special tokens of its own, comparisons, and a recipe."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("foreign")
    size = write_tokenizer(folder / "gpt2", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, 280)
    # Not 16 wide: vLLM's attention on CPUs knows head sizes from 32 on.
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, vocab_size=size, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    size = write_tokenizer(folder / "judge", special, 270)
    bert = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=size,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=0,
    )
    BertForSequenceClassification(bert).save_pretrained(folder / "judge")
    rows = [
        {"prompt": f"say {one} and {other}", "chosen": f"{one} {other}", "rejected": f"{other} {other} {one}"}
        for one in WORDS
        for other in WORDS
        if one != other
    ]
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "foreign.yaml").write_text(SETTINGS)
    return folder


def amenable(folder: Path, *arguments: str) -> dict:
    """The JSON answer of a command run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "amenable", *arguments, "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def service() -> Iterator[tuple[str, list[dict]]]:
    """A reward service that counts characters: its address, and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"scores": [len(response) for response in asked[-1]["responses"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score", asked
    server.shutdown()


def episodes(folder: Path) -> list[dict]:
    paths = sorted((folder / "runs" / "foreign" / "round-01" / "ppo" / "episodes").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_a_foreign_base_model_is_trained_and_rewarded_by_a_foreign_classifier_then_by_a_service(folder, service):
    from actors.rewards import HuggingFaceReward
    from models.build import load_tokenizer

    summary = amenable(folder, "run", "foreign.yaml")
    assert {"base", "collect"}.isdisjoint(stage.rpartition("/")[2] for stage in summary["stages"])
    assert summary["synthetic"] is False
    assert summary["reward_model"]["accuracy"]["pairs"] > 0

    run = folder / "runs" / "foreign"
    # The same pairs from a file: those that the run has held out.
    held_out = {row["prompt_id"] for row in pq.read_table(run / "data" / "comparisons-valid.parquet").to_pylist()}
    assert len(held_out) == summary["reward_model"]["accuracy"]["pairs"]
    texts = {row["prompt"] for row in pq.read_table(run / "data" / "comparisons-valid.parquet").to_pylist()}
    given = [json.loads(line) for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    again = folder / "held-out.jsonl"
    again.write_text("".join(json.dumps(row) + "\n" for row in given if any(row["prompt"] in text for text in texts)))
    scored = amenable(folder, "eval", "foreign.yaml", "--comparisons", str(again))
    assert scored["rows"]["scored"] == len(held_out)
    assert scored["reward_model"]["accuracy"] == summary["reward_model"]["accuracy"]
    assert set(scored["reward_model"]["baselines"]) == set(summary["reward_model"]["baselines"])

    tokenizer = load_tokenizer(str(run / "data" / "tokenizer"))
    judge = HuggingFaceReward(str(folder / "judge"), "auto", 32)
    rows = episodes(folder)
    assert len(rows) == 32
    texts = {row["prompt_id"]: row["prompt"] for row in pq.read_table(run / "data" / "prompts-ppo.parquet").to_pylist()}
    responses = [tokenizer.decode(row["response_tokens"], skip_special_tokens=True) for row in rows]
    scores = judge.score([texts[row["prompt_id"]] for row in rows], responses, [], [])
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)

    address, asked = service
    answer = amenable(folder, "ppo", "foreign.yaml", "reward.kind=http", f"reward.url={address}")
    redone = {name.rpartition("/")[2] for name, stage in answer["stages"].items() if not stage["reused"]}
    assert redone == {"select-sft", "ppo"}
    assert {prompt for each in asked for prompt in each["prompts"]} >= {
        texts[row["prompt_id"]] for row in episodes(folder)
    }
    assert all(row["score"] == int(row["score"]) for row in episodes(folder))
