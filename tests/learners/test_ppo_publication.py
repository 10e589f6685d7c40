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
        self.has_come = True
        monkeypatch.setattr(ppo_publication, "has_come", lambda _, within_s=0.0: self.has_come)

    def _publish(self, *arguments: Any) -> Publication:
        self.published.append(arguments)
        self.events.append("published")
        return Publication(1.0, 0.5, 0.0, 0.0)

    def of(self, answer: Any, what: str) -> Any:
        self.events.append(f"asked for {what}")
        return answer


def publisher(scene: Any, staleness: int, transport: str) -> Publisher:
    return Publisher(None, scene, scene, staleness, "float32", 0.1, [1, 2], transport)  # pyright: ignore


def test_over_ipc_weights_stay_on_the_gpu_until_every_publication_has_come_to_its_end(monkeypatch):
    scene = Scene(monkeypatch)
    each = publisher(scene, 1, "ipc")
    for update in (0, 1):
        each.begin((0, update), WEIGHTS, PROBE)
        assert each.figures()["sync/pause_seconds"] == 0.5
    arrived = "asked for the conductor to say that new weights are published"
    turn = ["held on the GPU", "published", arrived, "let go", arrived]
    assert scene.events == ["sender made", *turn, *turn]
    assert [(arguments[:2], arguments[4]) for arguments in scene.published] == [((0, 0), OFFER), ((0, 1), OFFER)]
    assert [arguments[2].version for arguments in scene.published] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("transport", ["object_store", "auto"])
def test_through_the_object_store_nothing_is_offered_and_nothing_is_waited_for(monkeypatch, transport):
    scene = Scene(monkeypatch)
    each = publisher(scene, 1, transport)
    for update in (0, 1):
        scene.has_come = False
        each.begin((0, update), WEIGHTS, PROBE)
        assert not each.has_come()
        assert each.figures() == {}
        scene.has_come = True
        assert each.has_come()
        assert each.figures()["sync/publish_seconds"] == 1.0
        assert each.figures() == {}  # each is told of once
    assert scene.events == ["published", "asked for the conductor to say that new weights are published"] * 2
    assert [len(arguments) for arguments in scene.published] == [4, 4]


@pytest.mark.parametrize(("staleness", "awaited"), [(0, [True, True]), (1, [True, False])])
@pytest.mark.parametrize("first", [True, False])
def test_on_every_rank_the_first_publication_and_at_staleness_0_each_is_waited_for(
    monkeypatch, staleness, awaited, first
):
    scene = Scene(monkeypatch)
    each = publisher(scene, staleness, "object_store")
    seen = []
    for _ in range(2):
        seen.append(each.is_awaited)
        each.let_lease(first)
    assert seen == awaited
    assert scene.events == ["asked for the generators to begin to lease"] * first  # once, by one rank
