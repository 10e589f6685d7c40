"""`amenable serve`, `pin` and `tokens` as a person meets them: sentences and exit codes; and the Serve config file."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from amenable.cli import app
from amenable.serve import check_listening
from corpus.problems import UsageProblem
from serving.access import TOKENS_VARIABLE, read_tokens
from tests.serving.run_on_disk import CONTEXT, commit, write_recipe, write_weights


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch):
    monkeypatch.delenv(TOKENS_VARIABLE, raising=False)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "run"
    write_recipe(run)
    write_weights(run / "sft" / "epoch-01", b"sft")
    commit(run / "sft", {"exports": [{"directory": "epoch-01", "valid_loss": 1.0}]})
    return run


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_without_tokens_it_listens_to_this_machine_alone(run, host):
    answer = invoke("serve", run, "--host", host)
    assert answer.exit_code == 2
    assert "there are no tokens" in answer.output


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_loopback_needs_none(host):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_listening(host, port, has_tokens=False)


def test_a_port_that_is_taken_is_told_of():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageProblem, match=r"cannot listen on 127\.0\.0\.1"):
            check_listening("127.0.0.1", taken.getsockname()[1], has_tokens=False)
    with pytest.raises(UsageProblem, match="1 to 65535"):
        check_listening("127.0.0.1", 0, has_tokens=False)


def test_a_run_that_cannot_be_served_says_why(tmp_path):
    assert "There is no run in" in invoke("serve", tmp_path / "nothing").output
    write_recipe(tmp_path / "new")
    answer = invoke("serve", tmp_path / "new", "--port", 18999)
    assert (answer.exit_code, "no model yet" in answer.output) == (1, True)


def test_a_token_file_that_is_none_is_told_of(run, tmp_path):
    file = tmp_path / "tokens.json"
    file.write_text("{}")
    answer = invoke("serve", run, "--token-file", file)
    assert (answer.exit_code, "is no token file" in answer.output) == (2, True)
    answer = invoke("serve", run, "--token-file", tmp_path / "nowhere")
    assert (answer.exit_code, "cannot be read" in answer.output) == (2, True)


def test_tokens_are_made_listed_and_revoked(tmp_path):
    file = tmp_path / "tokens.json"
    made = invoke("tokens", "add", file, "ada", "--scopes", "read,operate").output.split()[0]
    assert re.fullmatch(r"amn_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", made)
    [kept] = read_tokens(file).values()
    assert (kept.name, kept.scopes) == ("ada", {"read", "operate"})
    listed = invoke("tokens", "list", file).output
    assert kept.id in listed
    assert made not in listed
    assert invoke("tokens", "revoke", file, kept.id).exit_code == 0
    answer = invoke("tokens", "revoke", file, kept.id)
    assert (answer.exit_code, "has no token" in answer.output) == (2, True)
    answer = invoke("tokens", "add", file, "bob", "--scopes", "write")
    assert (answer.exit_code, "should be some of read, score, operate" in answer.output) == (2, True)


def test_pin_says_what_is_wanted_and_by_whom(run):
    assert "the newest weights." in invoke("pin", run).output
    answer = invoke("pin", run, "policy@3")
    assert (answer.exit_code, "no published version policy@3" in answer.output) == (2, True)
    told = json.loads(invoke("pin", run, "newest", "--json").output)
    assert (told["wish"]["counter"], told["wish"]["pinned"], told["replicas"]) == (1, None, {})


def test_the_serve_config_file_is_one_and_builds_the_application(run):
    from ray.serve.schema import ServeDeploySchema

    from serving.application import DEPLOYMENT, Channel, bounds_of, build
    from serving.names import Names
    from serving.settings import ServingSettings

    content = yaml.safe_load(Path("serving/deploy.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(content).applications
    assert application.import_path == "serving.application:build"
    [deployment] = application.deployments
    assert deployment.name == DEPLOYMENT
    Channel.model_validate(deployment.user_config)
    built = build({**application.args, "run": str(run), "token_file": None})
    assert built._bound_deployment.name == DEPLOYMENT
    with pytest.raises(ValueError, match="extra"):
        build({**application.args, "runn": str(run)})
    bounds = bounds_of(ServingSettings(), Names(run).recipe(), run / "sft" / "epoch-01")
    assert (bounds.context_tokens, bounds.prompt_tokens, bounds.max_tokens, bounds.vocabulary) == (CONTEXT, 63, 24, 97)
