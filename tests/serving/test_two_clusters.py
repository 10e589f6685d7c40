"""A run that trains in one Ray cluster and is served by another; all that they share is the run's directory."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from actors.published import PublishedSnapshot, published
from actors.snapshot_files import map_snapshot
from models.snapshot import unpack
from serving.names import Names
from tests.serving.run_on_disk import commit
from tests.serving.served import Asking, Service, serve, until

CHAOS = Path(__file__).parents[1] / "chaos"
sys.path.insert(0, str(CHAOS))  # the toy run, and the command that trains it

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(600)]

PROMPT = [3, 5, 7, 2]
EVERY_S = 10.0


class Training:
    """PPO of the toy run in a Ray session of its own, which goes no further than it is let."""

    def __init__(self, directory: Path) -> None:
        from harness import Command
        from toy_run import write_given

        (directory / "processes").mkdir(parents=True)
        self.directory, self.run = directory, write_given(directory / "run")
        commit(self.run / "base")
        commit(self.run / "round-01" / "ppo-init")
        self.before(3)
        self.command = Command(directory, self.run, "--updates=60")

    def serve_small(self) -> None:
        """Writes into the recipe of the run, once it is there, that one small engine serves it."""
        path = self.run / "recipe.yaml"
        until(path.exists, "recipe.yaml")
        content = yaml.safe_load(path.read_text())
        small = {"memory_budget_gib": 2.5, "engine_gib": 2.5, "kv_cache_mib": 16, "max_concurrent": 8, "follow_s": 0.1}
        content["serving"] |= small
        path.write_text(yaml.safe_dump(content))

    def before(self, update: int) -> None:
        """Lets it publish what comes before this update, and no more; for a minute and a half, then it goes on."""
        self._allowed = update
        new = self.directory / "brake.new"
        new.write_text(str(update))
        new.rename(self.directory / "brake")

    @contextmanager
    def going_slowly(self) -> Iterator[None]:
        """One update every EVERY_S seconds while the block lasts."""
        over = threading.Event()

        def go_on() -> None:
            while not over.wait(EVERY_S):
                self.before(self._allowed + 1)

        going = threading.Thread(target=go_on)
        going.start()
        try:
            yield
        finally:
            over.set()
            going.join()

    def newest(self) -> PublishedSnapshot | None:
        assert not self.command.is_over(), self.command.said[-3000:]
        found = published(Names(self.run).published)
        return found[-1] if found else None

    def settled(self) -> PublishedSnapshot:
        """Waits until all that it may publish is published, and returns the newest."""

        def found() -> PublishedSnapshot | None:
            newest = self.newest()
            return newest if newest is not None and newest.version[1] == self._allowed - 1 else None

        return until(found, f"version {self._allowed - 1} in RUN/published", 240)


@pytest.fixture
def training(tmp_path: Path) -> Any:
    from harness import end_processes

    training = Training(tmp_path / "training")
    yield training
    if not training.command.is_over():
        training.command.signal(signal.SIGTERM)
        training.command.wait()
    assert end_processes(training.directory) == []


def served_logprobs(service: Service) -> list[float]:
    body = {"model": "policy", "prompt": PROMPT, "echo": True, "max_tokens": 0, "logprobs": 1}
    status, _, answer = service.ask("POST", "/v1/completions", body)
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"][1:]


def logprobs_of(snapshot: PublishedSnapshot, skeleton: Path) -> list[float]:
    """What transformers says with a snapshot's weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(skeleton, dtype=torch.float32)
    model.load_state_dict(dict(unpack(map_snapshot(snapshot.weights))), strict=False)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()


def test_a_service_follows_a_run_that_trains_elsewhere_to_its_end(training, tmp_path):
    training.settled()
    training.serve_small()
    skeleton = Names(training.run).skeleton()
    with ExitStack() as served:
        with training.going_slowly():
            service = served.enter_context(serve(training.run, tmp_path))
        first = training.settled()
        until(lambda: service.serves("policy") == first.label, "the newest version in the engine")
        before = served_logprobs(service)
        assert before == pytest.approx(logprobs_of(first, skeleton), abs=1e-4)
        client = Asking(service, PROMPT)
        until(lambda: client.versions, "the first response")
        training.before(first.version[1] + 5)
        later = training.settled()
        until(lambda: service.serves("policy") == later.label, "a later version in the engine")
        after = served_logprobs(service)
        assert after == pytest.approx(logprobs_of(later, skeleton), abs=1e-4)
        assert after != pytest.approx(before, abs=1e-4)
        (training.directory / "brake").unlink()
        assert training.command.wait() == 0, training.command.said[-3000:]
        export = Names(training.run).find("policy").version
        assert export.startswith("policy-")
        until(lambda: service.serves("policy") == export, "PPO's export in the engine")
        until(lambda: export in client.versions, "a response of it")
        client.stop()
        assert {first.label, later.label, export} <= set(client.versions)
