import json
from pathlib import Path

import pytest
import torch
from recording_worker import RecordingWorker
from toy_data import demonstration_rows, write_counting, write_demonstrations
from transformers import AutoModelForCausalLM

from corpus.problems import RunProblem, UsageProblem
from learners import language_model, supervised
from learners.engine import Engine, EngineSettings
from learners.language_model import LanguageModelJob, LanguageModelSettings, train_language_model
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.worker import Interrupted
from models.build import TinyLlamaSettings

SHAPE = TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=16)
EOS = 14

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_demonstrations(directory / "demonstrations.parquet", demonstration_rows(40, 0))
    write_demonstrations(directory / "demonstrations-valid.parquet", demonstration_rows(20, 1))
    write_counting(directory / "pretraining.parquet")
    write_counting(directory / "pretraining-valid.parquet")
    return directory


@pytest.fixture
def sft(tmp_path, data, tokenizer_directory):
    def make(**changes) -> LanguageModelJob:
        settings = {"epochs": 2, "batch_size": 8, "context_length": 16, "optimizer": OptimizerSettings(peak_lr=1e-2)}
        engine = EngineSettings(tokens_per_microbatch=changes.pop("tokens_per_microbatch", 8192))
        directory = changes.pop("directory", tmp_path / "sft")
        fields = {
            name: changes.pop(name)
            for name in ("start", "seed", "identity", "pretraining", "pretraining_valid", "demonstrations")
            if name in changes
        }
        return LanguageModelJob(
            **{
                "stage": "sft",
                "identity": repr((settings | changes, fields)),
                "settings": LanguageModelSettings(**(settings | changes)),
                "engine": engine,
                "seed": 0,
                "directory": directory,
                "tokenizer": str(tokenizer_directory),
                "start": SHAPE,
                "max_new_tokens": 4,
                "demonstrations": data / "demonstrations.parquet",
                "demonstrations_valid": data / "demonstrations-valid.parquet",
                **fields,
            }
        )

    return make


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_sft_learns_the_pattern_and_exports_every_epoch(sft, worker):
    job = sft(epochs=12, residual_dropout=0.0, optimizer=OptimizerSettings(peak_lr=3e-2))
    results = train_language_model(job, worker)
    assert [entry["directory"] for entry in results["exports"]] == [f"epoch-{i:02d}" for i in range(1, 13)]
    losses = [entry["valid_loss"] for entry in results["exports"]]
    assert losses[0] > 1.0
    assert losses[-1] < 0.5 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(job.directory / "epoch-12")
    [(prompt, response)] = demonstration_rows(1, 0)
    tokens = torch.tensor([prompt + response])
    with torch.no_grad():
        predicted = model(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert predicted.tolist() == response


def test_metrics_have_a_line_a_step_and_progress_reaches_the_end(sft, worker):
    job = sft()
    results = train_language_model(job, worker)
    rows = read_metrics(job.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes", "epoch"} <= rows[0].keys()
    assert "valid/loss" in rows[4]
    assert rows[4]["epoch"] == 1.0
    last = worker.reports[-1]
    assert (last.stage, last.done, last.total, last.unit) == ("sft", 10, 10, "steps")
    assert results["steps"] == 10
    assert (job.directory / "checkpoints").exists()  # until the stage is committed


def test_a_learning_rate_of_zero_exports_the_weights_it_began_with(sft, worker):
    first = train_language_model(sft(epochs=1, optimizer=OptimizerSettings(peak_lr=0.0)), worker)
    directory = sft().directory / first["exports"][0]["directory"]
    kept = directory.rename(directory.with_name("kept"))
    again = sft(start=str(kept), optimizer=OptimizerSettings(peak_lr=0.0))
    train_language_model(again, worker)
    before, after = weights_of(kept), weights_of(directory)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_loss_is_over_response_tokens_of_the_whole_minibatch_however_it_is_cut(sft, worker, tmp_path):
    whole = sft(epochs=1, residual_dropout=0.0, directory=tmp_path / "whole")
    cut = sft(epochs=1, residual_dropout=0.0, directory=tmp_path / "cut", tokens_per_microbatch=8)
    for job in (whole, cut):
        train_language_model(job, worker)
    losses, others = ([row["loss"] for row in read_metrics(job.directory / "metrics.jsonl")] for job in (whole, cut))
    assert losses == pytest.approx(others, rel=1e-5)


def test_a_prompt_token_adds_nothing_to_the_loss(sft, worker, tmp_path):
    """With dropout and learning off, the validation loss is that of transformers' own labels on responses."""
    job = sft(epochs=1, residual_dropout=0.0, optimizer=OptimizerSettings(peak_lr=0.0))
    results = train_language_model(job, worker)
    model = AutoModelForCausalLM.from_pretrained(job.directory / "epoch-01")
    total, count = 0.0, 0
    for prompt, response in demonstration_rows(20, 1):
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += float(model(torch.tensor([prompt + response]), labels=labels).loss) * len(response)
        count += len(response)
    assert results["exports"][0]["valid_loss"] == pytest.approx(total / count, rel=1e-5)


def test_base_packs_documents_and_counts_steps(sft, data, worker):
    job = sft(
        demonstrations=None,
        pretraining=data / "pretraining.parquet",
        pretraining_valid=data / "pretraining-valid.parquet",
        steps=80,
        keep_epochs=False,
        residual_dropout=0.0,
        optimizer=OptimizerSettings(peak_lr=3e-2, warmup_steps=5, weight_decay=0.1),
    )
    results = train_language_model(job, worker)
    [export] = results["exports"]
    assert (export["directory"], export["steps"]) == ("export", 80)
    assert export["valid_loss"] < 1.0  # counting on is certain but for the first word of a document
    assert results["tokens"] > 80 * 7 * 16  # rows are full


def test_ppo_init_mixes_pretraining_documents_into_the_minibatches(sft, data, worker):
    share = {"pretraining": data / "pretraining.parquet", "pretraining_share": 0.2, "keep_epochs": False}
    mixed = train_language_model(sft(**share), worker)
    plain = train_language_model(sft(), worker)
    # 40 demonstrations and 10 documents of 7 tokens a pass, so 7 steps of 8 rows instead of 5
    assert (mixed["steps"], plain["steps"]) == (14, 10)
    assert mixed["tokens"] == plain["tokens"] + 2 * 10 * 7
    assert [entry["directory"] for entry in mixed["exports"]] == ["export"]


def exports_of(job: LanguageModelJob, results) -> list[dict[str, torch.Tensor]]:
    return [weights_of(job.directory / entry["directory"]) for entry in results["exports"]]


@pytest.mark.parametrize("stop_after", [3, 5])
def test_interrupted_and_continued_is_bitwise_the_uninterrupted_run(sft, tmp_path, stop_after):
    """With dropout; step 5 is the end of an epoch, which is then already exported."""
    whole = sft(directory=tmp_path / "whole")
    expected = train_language_model(whole, RecordingWorker())
    job = sft(directory=tmp_path / "interrupted")
    with pytest.raises(Interrupted, match=f"step {stop_after} of 10"):
        train_language_model(job, RecordingWorker(stop_after=stop_after))
    assert (job.directory / "checkpoints").exists()
    torch.rand(3)
    found = train_language_model(job, RecordingWorker())
    assert found["exports"] == expected["exports"]
    for ours, theirs in zip(exports_of(job, found), exports_of(whole, expected), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses, others = ([r["loss"] for r in read_metrics(j.directory / "metrics.jsonl")] for j in (job, whole))
    assert losses == others


def test_a_checkpoint_of_another_job_is_not_continued(sft):
    job = sft()
    with pytest.raises(Interrupted):
        train_language_model(job, RecordingWorker(stop_after=3))
    results = train_language_model(sft(identity="b"), RecordingWorker())
    assert results["steps"] == 10


def test_a_checkpoint_is_written_while_training_goes_on(sft, monkeypatch):
    written = []
    real = language_model.SupervisedLoop._save
    monkeypatch.setattr(
        language_model.SupervisedLoop, "_save", lambda loop, owed: (written.append(loop._step), real(loop, owed))
    )
    train_language_model(sft(checkpoint_seconds=1e-9), RecordingWorker())
    assert written == list(range(1, 11))


def test_a_loss_that_is_not_finite_names_stage_and_step_and_keeps_what_is_exported(sft, monkeypatch, worker):
    real = language_model.token_cross_entropy
    calls = 0

    def poisoned(*arguments):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(*arguments) * (float("nan") if calls == 8 else 1.0)

    monkeypatch.setattr(language_model, "token_cross_entropy", poisoned)
    job = sft()
    with pytest.raises(RunProblem, match="sft: the loss is nan at step 8"):
        train_language_model(job, worker)
    assert weights_of(job.directory / "epoch-01")
    assert not (job.directory / "epoch-02").exists()


def spoilt_gradient(monkeypatch, at_step: int) -> None:
    """The gradients of one step are not finite, and its loss is."""
    real, steps = Engine.backward, [0]

    def backward(engine, loss):
        steps[0] += 1
        real(engine, loss * (float("inf") if steps[0] == at_step else 1.0))

    monkeypatch.setattr(Engine, "backward", backward)


def spoilt_loss(monkeypatch, at_step: int) -> None:
    real, steps = language_model.token_cross_entropy, [0]

    def loss(*arguments):
        steps[0] += torch.is_grad_enabled()
        return real(*arguments) * (float("nan") if steps[0] == at_step else 1.0)

    monkeypatch.setattr(language_model, "token_cross_entropy", loss)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [(spoilt_loss, "the loss is nan at step 8"), (spoilt_gradient, "gradient norm is not finite")],
)
def test_what_was_trained_before_a_loss_or_gradient_that_is_not_finite_is_kept(
    sft, worker, tmp_path, monkeypatch, spoil, sentence
):
    whole = sft(directory=tmp_path / "whole")
    expected = train_language_model(whole, RecordingWorker())
    job = sft()
    with monkeypatch.context() as patch:
        spoil(patch, 8)
        with pytest.raises(RunProblem, match=sentence):
            train_language_model(job, worker)
    [kept] = (job.directory / "checkpoints").iterdir()
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        with pytest.raises(RunProblem, match=r"not finite|nan"):
            train_language_model(job, RecordingWorker())
    assert list((job.directory / "checkpoints").iterdir()) == [kept], "there is nothing new to keep"
    found = train_language_model(job, RecordingWorker())
    assert found["steps"] == 3
    assert found["exports"] == expected["exports"]
    for ours, theirs in zip(exports_of(job, found), exports_of(whole, expected), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_cannot_be_written_does_not_hide_why_the_training_ends(sft, worker, monkeypatch, caplog):
    def full(*arguments, **named):
        raise RunProblem("the disk is full", "storage/full")

    monkeypatch.setattr(supervised, "write_checkpoint", full)
    spoilt_loss(monkeypatch, 3)
    with pytest.raises(RunProblem, match="the loss is nan at step 3"):
        train_language_model(sft(), worker)
    assert "no checkpoint could be written at step 2: the disk is full" in caplog.text


def test_a_disk_that_fills_while_exporting_is_one_sentence_and_earlier_epochs_stay(sft, monkeypatch, worker):
    real = language_model.export_causal_lm

    def full(directory, *arguments):
        real(directory, *arguments)
        if directory.name.startswith("epoch-02"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(language_model, "export_causal_lm", full)
    job = sft()
    with pytest.raises(RunProblem, match=r"epoch-02: the export was not written \(.*No space left"):
        train_language_model(job, worker)
    assert weights_of(job.directory / "epoch-01")
    assert sorted(path.name for path in job.directory.glob("epoch*")) == ["epoch-01"]


def test_an_export_that_fails_after_the_last_step_is_made_good_without_training_again(
    sft, monkeypatch, worker, tmp_path
):
    whole = sft(directory=tmp_path / "whole")
    expected = train_language_model(whole, RecordingWorker())
    real, job = language_model.export_causal_lm, sft()

    def full(directory, *arguments):
        if directory.name.startswith("epoch-02"):
            raise OSError(28, "No space left on device")
        real(directory, *arguments)

    monkeypatch.setattr(language_model, "export_causal_lm", full)
    with pytest.raises(RunProblem, match="No space left"):
        train_language_model(job, worker)
    monkeypatch.setattr(language_model, "export_causal_lm", real)
    found = train_language_model(job, RecordingWorker())
    assert found["steps"] == 0
    assert found["exports"] == expected["exports"]
    for ours, theirs in zip(exports_of(job, found), exports_of(whole, expected), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines, others = (read_metrics(each.directory / "metrics.jsonl") for each in (job, whole))
    for name in ("step", "loss", "lr", "epoch", "valid/loss"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in others]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context_length": 17}, "context_length is 17; the model reads at most 16"),
        ({"context_length": 6}, "tokens; the context length is 6"),
        ({"pretraining_share": 0.1}, "needs both demonstrations and pretraining"),
        ({"start": "/nowhere/model"}, "does not exist"),
    ],
)
def test_unusable_input_is_refused_before_training(sft, worker, changes, sentence):
    with pytest.raises(UsageProblem, match=sentence):
        train_language_model(sft(**changes), worker)


def test_steps_and_kept_epochs_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        LanguageModelSettings(steps=3)


def test_results_are_plain_json(sft, worker):
    json.dumps(train_language_model(sft(epochs=1), worker), allow_nan=False)
