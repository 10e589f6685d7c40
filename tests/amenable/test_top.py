"""`amenable top` before a recorded run: under way, at its end, without a terminal, in an object store."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from actors.desired import write_desired, write_fleet
from actors.worker_rows import WorkerRow, write_workers
from amenable.cli import app
from amenable.pipeline import stages_of
from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe
from amenable.run_directory import RunDirectory
from amenable.run_lease import RunLease
from amenable.run_view import NOBODY, STAGES, RunView, Watch, Writer
from amenable.top import lines, picture
from corpus.audit_log import ENDED, add, entry_now

pytest_plugins = ["tests.object_store"]

RECORDED = Path(__file__).parent / "recorded_run"
SOMEBODY = Writer("node-7, process 41", True, None)
UPDATES = 12


@pytest.fixture
def run(tmp_path) -> Path:
    """A run in the midst of PPO: recorded figures, and what a conductor says of two generators and a scorer."""
    root = tmp_path / "demo"
    shutil.copytree(RECORDED, root)
    ppo = root / "round-01" / "ppo"
    rows = [
        WorkerRow("generator-0", "generator", "healthy", 0, 0, 11, 0.62, 0.9, 345.0, 3 << 29),
        WorkerRow("generator-1", "generator", "healthy", 1, 0, 11, 0.58, 0.9, 310.4, 3 << 29),
        WorkerRow("scoring-0", "scoring process", "healthy", 0, None, None, 0.11, 0.2, 1690.5, 1 << 29),
    ]
    write_workers(ppo, 0, 11, 0.06, rows)
    states = {"generator-0": "healthy", "generator-1": "restarting", "scoring-0": "healthy"}
    lost = [1795853330.0, "generator-1 was given up: it has been silent for 31 s."]
    write_fleet(ppo, {"counter": 1, "workers": states, "waiting": [], "lost": lost, "problem": ""})
    write_desired(ppo, 0, 2, "ann@node-7", "2026-11-28T08:09:00+00:00")
    return root


def metrics(run: Path) -> Path:
    return run / "round-01" / "ppo" / "metrics.jsonl"


def newest(run: Path) -> float:
    return json.loads(metrics(run).read_text().splitlines()[-1])["time"]


def looked(run: Path, writer: Writer = SOMEBODY, later_s: float = 1.0) -> RunView:
    """The view `later_s` seconds after the newest line, however long ago what the fixture wrote with it was."""
    for name in ("workers.json", "fleet.json"):
        path = run / "round-01" / "ppo" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": newest(run)}))
    return Watch(run, str(run)).look(writer, now=newest(run) + later_s)


def drawn(view: RunView, width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.capture() as captured:
        console.print(picture(view, width))
    return captured.get().splitlines()


def finish(run: Path) -> None:
    for stage in ("round-01/ppo", "round-01/eval"):
        (run / stage).mkdir(exist_ok=True)
        shutil.copy(run / "round-01" / "rm" / "stage.json", run / stage / "stage.json")
    (run / "summary.json").write_text(json.dumps({"verdict": "PPO's answers beat the baseline's."}))


def test_the_stages_are_those_of_the_pipeline():
    recipe = load_recipe("demo", [], Recipe)
    run = RunDirectory("runs/x")
    found = {stage.name: run.relative(stage.spec.directory) for stage in stages_of(recipe, run, {})}
    assert found == STAGES
    assert list(found) == list(STAGES)


def test_a_run_under_way_says_how_far_it_is_and_how_long_it_takes(run):
    view = looked(run)
    assert (view.state, view.stage, view.stage_state, view.attempt) == ("running", "ppo", "under way", 0)
    assert (view.stages_done, view.stages) == (7, 9)
    assert (view.done, view.total, view.unit) == (UPDATES, 40, "updates")
    assert view.age_s == pytest.approx(1.0)
    times = [json.loads(line)["time"] for line in metrics(run).read_text().splitlines()]
    an_update = (times[-1] - times[0]) / (UPDATES - 1)
    assert view.seconds_a_step == pytest.approx(an_update)
    assert view.seconds_left == pytest.approx((40 - UPDATES) * an_update - 1.0)
    assert looked(run, NOBODY).seconds_left is None


def test_every_role_has_its_line(run):
    roles = {role.name: role for role in looked(run).roles}
    assert list(roles) == ["conductor", "generator-0", "generator-1", "scoring-0 (scoring process)", "learner"]
    one, two = roles["generator-0"], roles["generator-1"]
    assert (one.state, one.version, one.tokens_per_second, one.busy_share) == ("healthy", "0.11", 345.0, 0.62)
    assert two.state == "restarting", "what the fleet said last counts, not the last publication"
    assert (roles["conductor"].version, roles["learner"].version) == ("0.11", f"0.{UPDATES}")
    row = json.loads(metrics(run).read_text().splitlines()[-1])
    expected = 1 - row["time/wait_for_episodes"] / row["time/update"]
    assert roles["learner"].busy_share == pytest.approx(expected)
    write_workers(run / "round-01" / "ppo", 0, 11, 0.06, [])
    assert {role.name for role in looked(run).roles} >= {"generator-0", "scoring-0"}


def test_stream_staleness_publication_curves_and_the_last_problem_are_shown(run):
    view = looked(run)
    row = json.loads(metrics(run).read_text().splitlines()[-1])
    assert view.stream["admitted"] == row["stream/admitted"] > 0
    assert view.staleness["straggler_age_seconds"] == row["staleness/straggler_age_seconds"]
    assert view.publication["publish_seconds"] == row["sync/publish_seconds"]
    assert (view.wanted_generators, view.fleet["generators_serving"]) == (2, 1)
    curves = {curve.name: curve for curve in view.curves}
    assert list(curves) == ["reward", "held-out gold", "KL", "length", "episodes/s"]
    assert len(curves["reward"].values) == UPDATES
    assert curves["KL"].values[-1] == row["objective/kl"]
    assert view.problem.endswith("generator-1 was given up: it has been silent for 31 s.")


def test_the_newest_problem_is_the_one_that_is_told(run):
    add(run, entry_now(ENDED, {}, "failed: The loss is not finite."))
    assert looked(run).problem.endswith("The loss is not finite.")
    add(run, entry_now(ENDED, {}))
    assert looked(run).problem.endswith("The loss is not finite."), "an end that was none is no problem"


@pytest.mark.parametrize("width", [80, 120])
def test_the_picture_fits_its_terminal(run, width):
    add(run, entry_now(ENDED, {}, "failed: The loss is not finite, in words that go on for very much longer. " * 3))
    rows = drawn(looked(run), width)
    assert max(cell_len(row) for row in rows) <= width
    text = "\n".join(rows)
    for said in (
        "generator-0",
        "generator-1",
        "restarting",
        "345",
        "62%",
        "12 of 40 updates",
        "KL 0.",
        "slots: ",
        "last problem",
    ):
        assert said in text
    assert sum(0x2800 < ord(character) < 0x2900 for character in text) > 50
    assert drawn(looked(run, NOBODY), width) != rows


def test_plain_lines_say_the_same_without_a_terminal(run):
    ended = CliRunner().invoke(app, ["top", str(run), "--once"])
    assert ended.exit_code == 0, ended.output
    assert "\x1b" not in ended.stdout
    assert "generator-0: healthy, weights 0.11, 345 tokens/s, 62% busy, 1.5 GiB" in ended.stdout.splitlines()
    assert "stopped: nobody works on it" in ended.stdout
    assert "[7 of 9 done] ppo, attempt 0, interrupted: 12 of 40 updates" in ended.stdout.splitlines()


def test_a_line_that_is_half_written_is_read_when_it_is_whole(run):
    watch = Watch(run, str(run))
    assert watch.look(SOMEBODY).done == UPDATES
    line = json.dumps({"step": UPDATES + 1, "time": newest(run) + 2, "objective/scores": 0.5}) + "\n"
    with open(metrics(run), "a") as stream:
        stream.write(line[:20])
        stream.flush()
        view = watch.look(SOMEBODY)
        assert (view.done, view.unreadable_lines) == (UPDATES, 0)
        stream.write(line[20:])
    view = watch.look(SOMEBODY)
    assert (view.done, view.unreadable_lines) == (UPDATES + 1, 0)
    assert view.curves[0].values[-1] == 0.5


def test_a_line_that_is_none_is_counted_and_passed_over(run):
    with open(metrics(run), "a") as stream:
        stream.write("{half a line of a machine that went down\n[]\n")
    view = Watch(run, str(run)).look(SOMEBODY)
    assert (view.done, view.unreadable_lines) == (UPDATES, 2)
    assert "2 lines of metrics.jsonl could not be read." in lines(view)


def test_a_file_that_was_cut_back_is_read_anew(run):
    watch = Watch(run, str(run))
    assert watch.look(SOMEBODY).done == UPDATES
    kept = metrics(run).read_text().splitlines(keepends=True)[:5]
    partial = metrics(run).with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(metrics(run))
    view = watch.look(SOMEBODY)
    assert (view.done, len(view.curves[0].values)) == (5, 5)


def test_a_run_under_way_that_writes_nothing_is_told(run):
    assert "it has written nothing since" not in lines(looked(run))[0]
    assert "newest line 5 min old: it has written nothing since" in lines(looked(run, later_s=300))[0]
    assert "it has written nothing since" not in lines(looked(run, NOBODY, later_s=300))[0]


def test_a_run_that_is_done_shows_its_ppo_and_its_verdict_and_ends_the_command(run):
    finish(run)
    ended = CliRunner().invoke(app, ["top", str(run), "--every", "0.2"])  # without --once
    assert ended.exit_code == 0, ended.output
    assert f"demo ({run}): done; newest line " in ended.stdout
    assert "[9 of 9 done] eval, done" in ended.stdout
    assert "ppo, the last stage with figures: 12 of 40 updates" in ended.stdout
    assert "PPO's answers beat the baseline's." in ended.stdout
    assert "left" not in ended.stdout


def test_a_supervised_stage_shows_its_loss(run):
    shutil.rmtree(run / "round-01")
    os.remove(run / "sft" / "stage.json")
    (run / "sft" / "stage.started.json").write_text("{}")
    rows = [{"step": step, "time": 100.0 + step, "loss": 3 / step, "epoch": step / 10} for step in range(1, 6)]
    (run / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = Watch(run, str(run)).look(SOMEBODY, now=106.0)
    assert (view.stage, view.done, view.total, view.unit) == ("sft", 0.5, 4, "epochs")
    assert [curve.name for curve in view.curves] == ["loss"]
    assert any("[2 of 9 done] sft, under way: 0.50 of 4 epochs" in line for line in lines(view))


def test_one_json_answer_has_all_of_it(run):
    with RunLease(run):
        ended = CliRunner().invoke(app, ["top", str(run), "--once", "--json"])
    assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    assert (answer["schema_version"], answer["run"], answer["state"], answer["done"]) == (1, "demo", "running", UPDATES)
    assert answer["roles"][1]["name"] == "generator-0"
    assert set(answer) == {"schema_version", *RunView.__dataclass_fields__}


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_ends_it_without_a_problem(run, as_json):
    command = [sys.executable, "-m", "amenable", "top", str(run), "--every", "0.2", *(["--json"] if as_json else [])]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore Ctrl-C, and these tests may be in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    second = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    if as_json:
        assert [json.loads(each)["run"] for each in (first, second)] == ["demo", "demo"]
    else:
        assert first.startswith("demo (")


def test_a_run_that_is_not_there_is_told(tmp_path):
    ended = CliRunner().invoke(app, ["top", str(tmp_path / "nowhere")])
    assert (ended.exit_code, "There is no run in" in ended.output) == (2, True)


def test_a_run_in_an_object_store_is_looked_at_without_its_models(run, store, query, monkeypatch, tmp_path):
    from corpus import stored_directory

    monkeypatch.setenv("AMENABLE_WORKING_COPIES", str(tmp_path / "copies"))
    (run / "sft" / "epoch-01").mkdir()
    (run / "sft" / "epoch-01" / "model.safetensors").write_bytes(b"x" * 100)
    for path in run.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), "bucket", f"demo/{path.relative_to(run).as_posix()}")
    add(f"s3://bucket/demo{query}", entry_now(ENDED, {}, "failed: The disk is full."))
    fetched = []
    fetch = stored_directory.fetch
    monkeypatch.setattr(
        stored_directory,
        "fetch",
        lambda system, inner, target: (fetched.append(inner), fetch(system, inner, target))[1],
    )
    ended = CliRunner().invoke(app, ["top", f"s3://bucket/demo{query}", "--once", "--json"])
    assert ended.exit_code == 0, ended.output
    answer = json.loads(ended.stdout)
    assert (answer["run"], answer["place"], answer["done"]) == ("demo", "s3://bucket/demo", UPDATES)
    assert answer["problem"].endswith("The disk is full.")
    assert "bucket/demo/round-01/ppo/metrics.jsonl" in fetched
    assert not [name for name in fetched if name.endswith((".safetensors", ".parquet"))]


def test_a_working_copy_that_is_worked_on_here_is_newer_than_its_store(run, store, query, monkeypatch, tmp_path):
    monkeypatch.setenv("AMENABLE_WORKING_COPIES", str(tmp_path / "copies"))
    store.put_object(Bucket="bucket", Key="demo/recipe.yaml", Body=(run / "recipe.yaml").read_bytes())
    address = f"s3://bucket/demo{query}"
    copy = RunDirectory(address).root
    shutil.copytree(run, copy)

    def done() -> float:
        ended = CliRunner().invoke(app, ["top", address, "--once", "--json"])
        assert ended.exit_code == 0, ended.output
        return json.loads(ended.stdout)["done"]

    assert done() == 0
    with RunLease(copy):
        assert done() == UPDATES
