import json
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from learners.metrics import MetricsLog, read_metrics


def log_steps(directory, steps, resumed_step=None, name="loss"):
    with MetricsLog(directory, resumed_step) as metrics:
        for step in steps:
            metrics.log(step, {name: step / 2})


def test_a_line_has_step_time_and_numbers(tmp_path):
    log_steps(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    assert lines[0]["time"] > 1e9


def test_a_resumed_run_takes_out_what_the_lost_attempt_wrote_after_its_step(tmp_path, monkeypatch):
    # Files of one second are read by the names that their process's counter gives them, and 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    log_steps(tmp_path, range(1, 6))
    log_steps(tmp_path, range(4, 7), resumed_step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(event.step for event in events.Scalars("loss")) == [1, 2, 3, 4, 5, 6]


def test_a_fresh_run_starts_anew(tmp_path):
    log_steps(tmp_path, [1, 2, 3])
    log_steps(tmp_path, [1], name="other")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"] == ["other"]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    log_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in read_metrics(path)] == [1]
    log_steps(tmp_path, [2], resumed_step=1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_number_that_is_not_finite_is_null_so_the_file_stays_json(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        metrics.log(1, {"loss": math.nan, "lr": 0.1})
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["lr"]) == (None, 0.1)


class Tracker:
    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def log(self, step, values):
        self.told.append((step, dict(values)))

    def close(self):
        pass


def test_an_evaluation_is_drawn_at_its_own_step_and_metrics_keep_one_line_a_step(tmp_path):
    tracker = Tracker()
    with MetricsLog(tmp_path, tracker=tracker) as metrics:  # pyright: ignore[reportArgumentType]
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
        metrics.evaluated(2, {"eval/scores": 0.5, "eval/gold": None, "eval/kl": math.nan})
    assert [row.keys() for row in read_metrics(tmp_path / "metrics.jsonl")] == [{"step", "time", "loss"}] * 3
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/scores")] == [(2, 0.5)]
    assert sorted(events.Tags()["scalars"]) == ["eval/scores", "loss"]
    assert tracker.told[-1] == (3, {"eval/update": 2.0, "eval/scores": 0.5})
