"""Log lines name run, role and worker, in words or as JSON."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from amenable.cli import app
from amenable.progress import Progress
from corpus import logs
from corpus.problems import UsageProblem

ROOT = Path(__file__).parents[2]

WORKER = """
import logging
from corpus import logs
logs.begin("generator", "generator-1")
logs.note_attempt(2)
logging.getLogger("actors.roster").info("two lines\\nof news")
logging.getLogger("somebody.else").info("not worth a line")
try:
    raise ValueError("apart")
except ValueError:
    logging.getLogger("somebody.else").exception("it went wrong")
logs.begin("generator", "generator-2")
logging.getLogger("actors.roster").warning("once")
"""


def worker(**environment: str) -> list[str]:
    """What a process of a run writes to standard error."""
    found = subprocess.run(
        [sys.executable, "-c", WORKER],
        env={**os.environ, "PYTHONPATH": str(ROOT), "AMENABLE_RUN": "demo", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout == ""
    return found.stderr.splitlines()


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv("AMENABLE_LOG", "json")
    yield
    logging.getLogger().handlers = [
        each for each in logging.getLogger().handlers if not isinstance(each, logs._Handler)
    ]


def test_every_line_of_a_worker_is_an_object_that_says_who_wrote_it():
    news, wrong, second = [json.loads(line) for line in worker(AMENABLE_LOG="json")]
    assert (news["run"], news["role"], news["worker"], news["attempt"]) == ("demo", "generator", "generator-1", 2)
    assert (news["level"], news["message"], news["logger"]) == ("INFO", "two lines\nof news", "actors.roster")
    assert news["node"] == os.uname().nodename
    assert news["time"].endswith("+00:00")
    assert (wrong["level"], wrong["message"]) == ("ERROR", "it went wrong")
    assert wrong["error"].endswith("ValueError: apart")
    assert (second["worker"], second["attempt"], second["message"]) == ("generator-2", None, "once")


@pytest.mark.parametrize("environment", [{"AMENABLE_LOG": "plain"}, {"AMENABLE_LOG": ""}])
def test_plain_lines_say_the_same_in_short(environment):
    lines = worker(**environment)
    who = f"[demo generator-1 attempt 2 {os.uname().nodename}]"
    assert lines[0].endswith(f"Z INFO {who} two lines")
    assert lines[2].endswith(f"Z ERROR {who} it went wrong")
    assert lines[-2] == "ValueError: apart"
    assert lines[-1].endswith("once")


def test_a_word_that_is_neither_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UsageProblem, match="AMENABLE_LOG='yaml' in the environment should be json or plain"):
        logs.wanted({"AMENABLE_LOG": "yaml"})
    assert (logs.wanted({}), logs.wanted({"AMENABLE_LOG": "json"})) == ("plain", "json")
    monkeypatch.setenv("AMENABLE_LOG", "yaml")
    ended = CliRunner().invoke(app, ["run", "demo", "--run", str(tmp_path / "x")])
    assert (ended.exit_code, "AMENABLE_LOG='yaml'" in ended.stderr) == (2, True)


def test_progress_is_told_as_log_lines_on_standard_error(as_json, capfd):
    logs.begin("driver", run="demo")
    with Progress(["sft"]) as progress:
        progress.stage("sft")
        progress.note("a word")
    out, err = capfd.readouterr()
    assert out == ""
    said = [json.loads(line) for line in err.splitlines()]
    assert [each["message"] for each in said] == ["[1 of 1] sft: started", "a word"]
    assert {(each["run"], each["role"]) for each in said} == {("demo", "driver")}


def test_progress_is_plain_text_without(monkeypatch):
    monkeypatch.delenv("AMENABLE_LOG", raising=False)
    file = io.StringIO()
    with Progress(["sft"], console=Console(file=file)) as progress:
        progress.stage("sft")
    assert file.getvalue() == "[1 of 1] sft: started\n"


def test_how_a_command_ended_is_a_log_line_and_the_answer_is_not(as_json, tmp_path):
    ended = CliRunner().invoke(app, ["run", "demo", "ppo.update=3", "--run", str(tmp_path / "x"), "--json"])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    said = json.loads(line)
    assert (said["level"], said["kind"], said["code"]) == ("ERROR", "usage", "recipe/setting")
    assert json.loads(ended.stdout)["problem"] == said["message"]
