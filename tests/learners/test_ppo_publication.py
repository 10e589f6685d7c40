"""The learner's publisher: who sends, in which order, and what it waits for, by transport."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from actors.conductor import Probe, Publication
from learners import ppo_publication
from learners.ppo_publication import Publisher

PROBE = Probe([[1, 2]], [[-1.0]], 0.1)
WEIGHTS = {"weight": torch.ones(3)}
OFFER = {"names": ["weight"], "dtype_names": ["float32"], "shapes": [[3]]}


class Scene:
    """Conductor, answers and sender at once; `events` is what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.published: list[tuple[Any, ...]] = []
        self.publish = SimpleNamespace(remote=self._publish)
        self.start_leasing = SimpleNamespace(remote=lambda: "leasing")
        scene = self

        class Sender:
            def __init__(self, transport: str, device: Any, connect: Any, packed: bool) -> None:
                assert (transport, packed) == ("ipc", False)
                scene.events.append("sender made")

            def send(self, snapshot: Any, deliver: Any) -> None:
                scene.events.append("held on the GPU")
                deliver(OFFER)
                scene.events.append("let go")

        module = ModuleType("actors.gpu_transports")
        module.GpuSender = Sender  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "actors.gpu_transports", module)
        monkeypatch.setattr(ppo_publication, "has_come", lambda _: False)

    def _publish(self, *arguments: Any) -> Publication:
        self.published.append(arguments)
        self.events.append("published")
        return Publication(1.0, 0.5, 0.0, 0.0)

    def of(self, answer: Any, what: str) -> Any:
        self.events.append(f"waited for {what}")
        return answer


def publisher(scene: Any, staleness: int, transport: str) -> Publisher:
    return Publisher(None, scene, scene, staleness, "float32", 0.1, [1, 2], transport)  # pyright: ignore


def test_over_ipc_weights_stay_on_the_gpu_until_every_publication_has_come_to_its_end(monkeypatch):
    scene = Scene(monkeypatch)
    each = publisher(scene, 1, "ipc")
    for update in (0, 1):
        figures = each.publish((0, update), WEIGHTS, PROBE)
        assert figures["sync/pause_seconds"] == 0.5
    turn = ["held on the GPU", "published", "waited for new weights to be published", "let go"]
    leasing = ["waited for the generators to begin to lease"]
    assert scene.events == ["sender made", *turn, *leasing, *turn]
    assert [(arguments[:2], arguments[4]) for arguments in scene.published] == [((0, 0), OFFER), ((0, 1), OFFER)]
    assert [arguments[2].version for arguments in scene.published] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("transport", ["object_store", "auto"])
def test_through_the_object_store_nothing_is_offered_and_with_staleness_the_learner_goes_on(monkeypatch, transport):
    scene = Scene(monkeypatch)
    each = publisher(scene, 1, transport)
    each.publish((0, 0), WEIGHTS, PROBE)
    del scene.events[:]
    assert each.publish((0, 1), WEIGHTS, PROBE) == {}
    assert scene.events == ["published"]
    assert [len(arguments) for arguments in scene.published] == [4, 4]
