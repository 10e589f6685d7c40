"""lm-evaluation-harness, the program itself, against the endpoint: log-likelihood and generation, tasks from files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.front import ENABLED
from tests.serving.run_on_disk import CONTEXT, make_llama, make_tokenizer
from tests.serving.served import Service, serving

HARNESS = Path(sys.prefix) / "lm-eval"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.service,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not HARNESS.exists(), reason=f"lm-evaluation-harness is not in {HARNESS}, where make test-service puts it"
    ),
]

SEED = 21
"""Of the weights that `serving` publishes."""

QUESTIONS = [f"w{10 + n} w{40 + 3 * n} w{7 + n}" for n in range(12)]
CHOICES = ["w20 w21", "w33", "w50 w8 w9"]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: " "
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["w1000"], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Behind Ray Serve's own proxy: the other tests have HAProxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENABLED, "0")
        with serving(tmp_path_factory.mktemp("service")) as service:
            yield service


def log_likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Of a continuation's tokens, in nats, by transformers."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(continuation, add_special_tokens=False).input_ids
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([[*before, *after]])).logits[0], -1)
    return sum(float(logprobs[len(before) - 1 + n, token]) for n, token in enumerate(after))


def written(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """What stands after the prompt once the likeliest token was added `length` times, or up to the end of text."""
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        [found] = model.generate(tokens, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(found, skip_special_tokens=True).removeprefix(tokenizer.decode(tokens[0]))


def write_task(directory: Path, name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)


def evaluated(service: Service, tasks: Path, names: list[str], output: Path) -> dict[str, Any]:
    arguments = {
        "model": "policy",
        "base_url": f"{service.url}/v1/completions",
        "tokenizer": service.run / "data" / "tokenizer",
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": CONTEXT - 1,
        "max_retries": 3,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", ",".join(names), "--include_path", str(tasks)),
        *("--batch_size", "4", "--output_path", str(output)),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "cache")}
    given = {"PYTHONPATH": str(HARNESS), "OPENAI_API_KEY": service.token}
    done = subprocess.run(command, env={**os.environ, **offline, **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    [found] = output.rglob("results_*.json")
    return json.loads(found.read_text())["results"]


def test_the_harness_finds_what_transformers_says_of_the_same_weights(service, tmp_path):
    model, tokenizer = make_llama(SEED), make_tokenizer()
    chosen, worst, texts = [], [], []
    for question in QUESTIONS:
        found = [log_likelihood(model, tokenizer, question, choice) for choice in CHOICES]
        chosen.append({"question": question, "choices": CHOICES, "answer": found.index(max(found))})
        worst.append({"question": question, "choices": CHOICES, "answer": found.index(min(found))})
        texts.append({"question": question, "answer": written(model, tokenizer, question, 6)})
    others = [{**row, "answer": f"{row['answer']} w5"} for row in texts]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, kind, rows in (
        ("likeliest", CHOOSE, chosen),
        ("unlikeliest", CHOOSE, worst),
        ("greedy", WRITE, texts),
        ("another", WRITE, others),
    ):
        write_task(tasks, name, kind, rows)
    results = evaluated(service, tasks, ["likeliest", "unlikeliest", "greedy", "another"], tmp_path / "out")
    assert {name: each.get("acc,none", each.get("exact_match,none")) for name, each in results.items()} == {
        "likeliest": 1.0,
        "unlikeliest": 0.0,
        "greedy": 1.0,
        "another": 0.0,
    }
