import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recording_worker import RecordingWorker
from toy_data import EOS, GOOD, write_comparisons
from transformers import AutoModelForSequenceClassification

from corpus.problems import UsageProblem
from corpus.schemas import make_table, read_table, write_table
from learners.engine import EngineSettings
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.reward_model import RewardModelJob, RewardModelSettings, read_rankings, train_reward_model
from learners.worker import Interrupted
from models.build import TinyLlamaSettings, load_tokenizer, tiny_llama
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel, last_token_scores, load_scalar

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer_directory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_comparisons(directory / "train.parquet", 100, 0, ties=4)
    write_comparisons(directory / "valid.parquet", 30, 1, ties=1)
    write_comparisons(directory / "tied.parquet", 3, 1, ties=3)
    random = np.random.default_rng(2)
    answers = [[*random.choice([GOOD, 5], 3).tolist(), EOS] for _ in range(20)]
    columns = {
        "prompt_id": [str(i) for i in range(20)],
        "user_id": ["u"] * 20,
        "prompt": ["p"] * 20,
        "response": ["r"] * 20,
        "prompt_tokens": [[8, 9]] * 20,
        "response_tokens": answers,
        "meta": [""] * 20,
    }
    write_table(make_table("demonstrations", columns), directory / "demonstrations.parquet", "demonstrations")
    shape = TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=16)
    llama = tiny_llama(shape, 16, 13, None, EOS, seed=0)
    tokenizer = load_tokenizer(str(tokenizer_directory))
    export_causal_lm(directory / "sft", llama, llama.state_dict(), tokenizer, max_new_tokens=4)
    return directory


@pytest.fixture
def rm(tmp_path, data, tokenizer_directory):
    def make(directory: str = "rm", comparisons: str = "train", budget: int = 8192, **changes) -> RewardModelJob:
        settings = {"batch_prompts": 8, "optimizer": OptimizerSettings(peak_lr=1e-2)}
        return RewardModelJob(
            stage="rm",
            identity=repr((settings | changes, comparisons, budget)),
            settings=RewardModelSettings(**(settings | changes)),
            engine=EngineSettings(tokens_per_microbatch=budget),
            seed=0,
            directory=tmp_path / directory,
            start=str(data / "sft"),
            tokenizer=str(tokenizer_directory),
            comparisons=data / f"{comparisons}.parquet",
            comparisons_valid=data / "valid.parquet",
            demonstrations=data / "demonstrations.parquet",
        )

    return make


def test_a_toy_ranking_is_learned_and_measured_on_held_out_comparisons(rm, worker):
    job = rm(epochs=2)
    results = train_reward_model(job, worker)
    assert results["valid_accuracy"] > 0.9
    measured = [row for row in read_metrics(job.directory / "metrics.jsonl") if "valid/accuracy" in row]
    assert [row["step"] for row in measured] == [6, 12, 18, 24]
    assert measured[-1]["valid/accuracy"] == results["valid_accuracy"]
    assert results["rankings"] + results["tied"] == 100
    assert results["tied"] >= 4
    assert results["steps"] == 2 * 12  # the batch is counted in prompts: 93 untied rankings, 8 a step
    json.dumps(results, allow_nan=False)


def test_ties_count_in_the_loss_as_the_recipe_says(rm, worker):
    losses = {}
    for by in ("all_pairs", "untied_pairs"):
        job = rm(directory=by, optimizer=OptimizerSettings(peak_lr=0.0), normalised_by=by)
        train_reward_model(job, worker)
        losses[by] = [row["loss"] for row in read_metrics(job.directory / "metrics.jsonl")]
    assert all(untied >= counted - 1e-6 for counted, untied in zip(*losses.values(), strict=True))
    assert sum(losses["untied_pairs"]) > sum(losses["all_pairs"]) + 1e-3


def test_without_learning_it_stays_near_chance(rm, worker):
    results = train_reward_model(rm(optimizer=OptimizerSettings(peak_lr=0.0)), worker)
    assert 0.2 < results["valid_accuracy"] < 0.8


def score(model, sequences: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        rows = [torch.tensor([sequence]) for sequence in sequences]
        return torch.cat([last_token_scores(model(row, torch.ones_like(row)), torch.ones_like(row)) for row in rows])


def test_demonstrations_score_zero_on_average_and_the_export_loads_untouched(rm, data, worker):
    job = rm()
    results = train_reward_model(job, worker)
    table = read_table(data / "demonstrations.parquet", "demonstrations").to_pydict()
    pairs = zip(table["prompt_tokens"], table["response_tokens"], strict=True)
    sequences = [prompt + response for prompt, response in pairs]
    scores = score(load_scalar(str(job.directory / "export")), sequences)
    assert abs(float(scores.mean())) < 1e-4
    assert abs(results["bias"]) > 1e-3  # there was something to set
    classifier = AutoModelForSequenceClassification.from_pretrained(job.directory / "export")
    with torch.no_grad():
        logits = torch.cat([classifier(torch.tensor([sequence])).logits[:, 0] for sequence in sequences])
    assert torch.allclose(logits + classifier.config.reward_bias, scores, atol=1e-5)


def test_each_response_is_forwarded_once_an_epoch(rm, data, monkeypatch, worker):
    forwarded = []
    real = ScalarHeadModel.forward

    def counting(model, tokens, attention_mask):
        if torch.is_grad_enabled():
            forwarded.extend(tuple(row[mask.bool()].tolist()) for row, mask in zip(tokens, attention_mask, strict=True))
        return real(model, tokens, attention_mask)

    monkeypatch.setattr(ScalarHeadModel, "forward", counting)
    train_reward_model(rm(budget=64), worker)
    rankings, _ = read_rankings(read_table(data / "train.parquet", "comparisons"))
    responses = [tuple(sequence.tolist()) for ranking in rankings for sequence in ranking.sequences]
    assert sorted(forwarded) == sorted(responses)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_the_cut_into_microbatches(rm, worker):
    losses = []
    for budget in (8192, 64):
        job = rm(directory=f"rm-{budget}", budget=budget)
        train_reward_model(job, worker)
        losses.append([row["loss"] for row in read_metrics(job.directory / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_interrupted_and_continued_is_bitwise_the_uninterrupted_run(rm):
    whole, job = rm(directory="whole"), rm(directory="interrupted")
    expected = train_reward_model(whole, RecordingWorker())
    with pytest.raises(Interrupted):
        train_reward_model(job, RecordingWorker(stop_after=7))
    found = train_reward_model(job, RecordingWorker())
    assert (found["bias"], found["valid_loss"]) == (expected["bias"], expected["valid_loss"])
    ours, theirs = (load_scalar(str(j.directory / "export")).state_dict() for j in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rankings_that_are_all_ties_are_refused(rm, worker):
    with pytest.raises(UsageProblem, match=r"every ranking in .* is a tie"):
        train_reward_model(rm(comparisons="tied"), worker)
