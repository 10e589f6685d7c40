import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.problems import UsageProblem
from evaluation.run_files import read_metrics, read_run


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_metrics_become_curves_by_step(tmp_path: Path):
    path = write(
        tmp_path / "m.jsonl", '{"step": 1, "time": 0, "loss": 2, "lr": 1}\n{"step": 2, "time": 1, "loss": 1}\n'
    )
    assert read_metrics(path) == {"loss": ([1, 2], [2.0, 1.0]), "lr": ([1], [1.0])}


def test_of_a_step_done_twice_the_later_line_counts(tmp_path: Path):
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 9.0), (3, 9.0), (2, 4.0), (3, 3.0))]
    path = write(tmp_path / "m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path)["loss"] == ([1, 2, 3], [5.0, 4.0, 3.0])


def test_null_is_a_gap(tmp_path: Path):
    path = write(tmp_path / "m.jsonl", '{"step": 1, "loss": null}\n{"step": 2, "loss": 1.0}\n')
    assert read_metrics(path) == {"loss": ([2], [1.0])}


def test_nan_written_by_python_is_read(tmp_path: Path):
    [value] = read_metrics(write(tmp_path / "m.jsonl", '{"step": 1, "loss": NaN}\n'))["loss"][1]
    assert math.isnan(value)


def test_a_last_line_cut_short_is_left_out(tmp_path: Path):
    path = write(tmp_path / "m.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_metrics(path) == {"loss": ([1], [2.0])}


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[1]", '{"loss": 1}'])
def test_any_other_bad_line_is_named(line: str, tmp_path: Path):
    path = write(tmp_path / "m.jsonl", f'{{"step": 1, "loss": 2}}\n{line}\n{{"step": 3, "loss": 1}}\n')
    with pytest.raises(UsageProblem, match=r"m\.jsonl, line 2"):
        read_metrics(path)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageProblem, match="no such run directory"):
        read_run(tmp_path / "nothing")


def test_stages_are_told_apart_by_their_state(run_directory: Path):
    (run_directory / "round-01" / "ppo" / "stage.json").unlink()
    for file in (run_directory / "round-01" / "eval").iterdir():
        file.unlink()
    states = {stage.name: stage.state for stage in read_run(run_directory).stages}
    assert states["sft"] == "done"
    assert states["round-01/ppo"] == "unfinished"
    assert states["round-01/eval"] == "absent"


@pytest.mark.parametrize("name", ["lineage.json", "round-01/rm/stage.json"])
def test_a_broken_json_file_is_named(name: str, run_directory: Path):
    (run_directory / name).write_text("{")
    with pytest.raises(UsageProblem, match=Path(name).name):
        read_run(run_directory)


def test_a_broken_recipe_is_named(run_directory: Path):
    (run_directory / "recipe.yaml").write_text("a: [")
    with pytest.raises(UsageProblem, match=r"recipe\.yaml"):
        read_run(run_directory)


def test_a_broken_evaluation_is_named(run_directory: Path):
    path = run_directory / "round-01" / "ppo" / "evaluations.jsonl"
    path.write_text('{"update": 1, "kl": 1.0}\n')
    with pytest.raises(UsageProblem, match=r"evaluations\.jsonl, line 1: .*episodes"):
        read_run(run_directory)


LINEAGE = "lineage.json"
STAGE = "round-01/rm/stage.json"
METRICS = "round-01/ppo/metrics.jsonl"
EVALUATIONS = "round-01/ppo/evaluations.jsonl"
DEEP = b"[" * 99999


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (LINEAGE, b'{"stages": [1]}', "stages should be an object"),
        (LINEAGE, b'{"stages": {"sft": 3}}', "the stage sft should be an object"),
        (LINEAGE, b'{"stages": {"sft": {"parents": 3}}}', "whose parents are one, too"),
        (LINEAGE, b'{"stages": {"sft": {"seconds": "long"}}}', "the stage sft should have a number of seconds"),
        (LINEAGE, b'{"a":\n"\xff"}', "line 2: this is not UTF-8"),
        (LINEAGE, b'{"a":\n1,,}', "this is not JSON .* at line 2, column 3"),
        (LINEAGE, b'{"a": ' + DEEP, "nested too deeply"),
        (LINEAGE, None, "cannot be read"),
        ("recipe.yaml", b"a: \xff", "line 1: this is not UTF-8"),
        ("recipe.yaml", None, "cannot be read"),
        ("recipe.yaml", b"a: 1\nb: {c: [}", "line 2: this is not YAML"),
        ("recipe.yaml", b"a: 1\n  b: 2", "line 2: this is not YAML"),
        ("recipe.yaml", b"a: \x00", "this YAML cannot be read"),
        ("recipe.yaml", b"date: 2026-13-45", "this YAML cannot be read .month must be"),
        ("recipe.yaml", b"a: " + b"1" * 5000, "this YAML cannot be read"),
        ("recipe.yaml", DEEP, "this YAML cannot be read"),
        (STAGE, b'{"seconds": "12"}', "should have a number of seconds, not '12'"),
        (STAGE, b'{"seconds": NaN}', "should have a number of seconds"),
        (STAGE, b'{"seconds": -1}', "should have a number of seconds"),
        (STAGE, b'{"seconds": 1' + b"0" * 400 + b"}", "should have a number of seconds"),
        (METRICS, b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "line 1: loss is too large"),
        (METRICS, b'{"step": 1, "loss": ' + b"1" * 5000 + b"}\n", "line 1: .*too many digits"),
        (METRICS, b'{"step": NaN, "loss": 1}\n', "line 1: .*number called step"),
        (METRICS, None, "cannot be read"),
        (EVALUATIONS, b'{"update": 1e999, "episodes": 1, "kl": 1, "reward": 1, "length": 1, "eos_rate": 1}', "line 1"),
        ("round-01/eval/samples.parquet", b"junk", "not a readable Parquet"),
        ("round-01/eval/samples.parquet", None, "not a readable Parquet"),
        ("round-01/eval/results.json", b"\xff", "not evaluation results"),
        ("round-01/eval/results.json", None, "cannot be read"),
        ("round-01/select-sft/selection.json", b"\xff", "not UTF-8"),
    ],
)
def test_a_damaged_file_ends_in_one_sentence_that_names_it(name, content, says, run_directory: Path):
    path = run_directory / name
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UsageProblem, match=says) as told:
        read_run(run_directory)
    assert name in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("column", [{"length": ["long"]}, {"length": [-1]}, {"model": [None]}])
def test_lengths_that_are_none_are_told(column, run_directory: Path):
    path = run_directory / "round-01" / "eval" / "samples.parquet"
    pq.write_table(pa.table({"model": ["ppo"], "length": [3]} | column), path)
    with pytest.raises(UsageProblem, match=r"samples\.parquet: each row should have a model by name and a length"):
        read_run(run_directory)


def test_a_directory_that_may_not_be_listed_is_told(run_directory: Path, monkeypatch):
    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # the tests may run as root
    with pytest.raises(UsageProblem, match=r"round-01/collect: cannot be read \(Permission denied\)"):
        read_run(run_directory)
