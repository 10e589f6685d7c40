"""`amenable serve s3://…`: a service that shares nothing with the machine that trains but the object store."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from amenable.cli import app
from corpus.working_copies import WORKING_COPIES
from models.snapshot import Snapshot, pack
from tests.serving.run_on_disk import commit, make_llama, write_run
from tests.serving.served import Asking, Service, serve, until
from tests.serving.stored_run import objects, publish_stored, push

pytest_plugins = ["tests.object_store"]
pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(600)]

TOKENS = [5, 9, 33, 60]


def snapshot(update: int, seed: int) -> Snapshot:
    return pack(dict(make_llama(seed).named_parameters()), (0, update))


def served_logprobs(service: Service) -> list[float]:
    body = {"model": "policy", "prompt": TOKENS, "echo": True, "max_tokens": 0, "logprobs": 1}
    status, _, answer = service.ask("POST", "/v1/completions", body)
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"][1:]


def logprobs_of(seed: int) -> list[float]:
    with torch.no_grad():
        logits = make_llama(seed)(torch.tensor([TOKENS])).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist()


def test_a_service_follows_a_run_through_the_store_alone(store, query, tmp_path: Path, monkeypatch):
    address = f"s3://bucket/runs/toy{query}"
    trains = tmp_path / "trains"
    small: dict[str, Any] = {"memory_budget_gib": 2.5, "engine_gib": 2.5, "kv_cache_mib": 16, "max_concurrent": 8}
    write_run(trains, follow_s=0.1, loaded=["policy"], **small)
    commit(trains / "data")
    push(trains, address)
    publish_stored(trains, address, snapshot(1, seed=21))
    given = [trains / name for name in ("base", "sft", "round-01", "data", "recipe.yaml")]
    for path in given:  # whoever serves has nothing of this machine
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with serve(address, tmp_path) as service:
        until(lambda: service.serves("policy") == "0.1", "the report of the first version")
        assert served_logprobs(service) == pytest.approx(logprobs_of(21), abs=1e-4)
        client = Asking(service, TOKENS)
        until(lambda: client.versions, "the first response")
        publish_stored(trains, address, snapshot(2, seed=22))
        until(lambda: service.serves("policy") == "0.2", "the new version in the engine")
        until(lambda: "0.2" in client.versions, "a response of it")
        assert served_logprobs(service) == pytest.approx(logprobs_of(22), abs=1e-4)
        monkeypatch.setenv(WORKING_COPIES, str(tmp_path / "elsewhere"))  # a person at another machine
        ended = CliRunner().invoke(app, ["pin", address, "policy@1", "--json"])
        assert ended.exit_code == 0, ended.output
        [says] = json.loads(ended.stdout)["replicas"].values()
        assert says["slots"][0]["model"] == "policy"
        until(lambda: service.serves("policy") == "0.1", "the pinned version in the engine")
        client.stop()  # not one of its requests failed
        assert set(client.versions) == {"0.1", "0.2"}
        score = {"model": "rm", "pairs": [{"prompt": "w5", "response": "w9"}]}
        status, _, answer = service.ask("POST", "/v1/score", score)
        assert (status, len(json.loads(answer).get("scores", []))) == (200, 1), answer
    assert objects(store, "runs/toy/serving/replicas/") == []
    copies = tmp_path / "home" / ".cache" / "amenable" / "runs"
    assert [path.name for path in copies.iterdir()] == ["served"]
    assert "hush" not in (tmp_path / "logs" / "command").read_text()
