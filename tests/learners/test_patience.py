"""How long ranks wait for one another, as Ray Train is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray.train.torch

from learners.group import LearnerGroup, Patience
from learners.ranks import Ranks


@pytest.mark.parametrize(("stall_s", "collective_s"), [(7200.0, 7260), (90_000.0, 90_060), (5.0, 1800)])
def test_torch_gives_up_a_collective_only_after_the_stall_clock_has_told_who_stands_still(
    monkeypatch, stall_s, collective_s
):
    made: list[dict[str, Any]] = []

    def trainer(serve: Any, **settings: Any) -> Any:
        made.append(settings)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    group: Any = SimpleNamespace(_desk=None, _patience=Patience(300, stall_s=stall_s), _ended=None)
    LearnerGroup._fit(group, Ranks(2, 1), "/nowhere", "")
    assert group._ended is None
    [settings] = made
    assert settings["torch_config"].timeout_s == collective_s
    assert collective_s > stall_s
