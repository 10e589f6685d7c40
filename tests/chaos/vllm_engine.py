"""The generator's real engine, which also lingers in its phases."""

from typing import Any

import phases

from actors.episodes import parse_version
from actors.rollout_engine import Completion, Request, RolloutEngine
from models.snapshot import Snapshot


class VllmEngine(RolloutEngine):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._at_update = 0
        self._samples = False

    def submit(self, request: Request) -> None:
        super().submit(request)
        self._samples = self._samples or not request.score_prompt

    def step(self) -> list[Completion]:
        if self._samples:
            phases.linger("generator", "generating", self._at_update)
        completed = super().step()
        self._samples = self._samples and self.pending > 0
        return completed

    def load(self, snapshot: Snapshot, version: str, offer: Any = None) -> float:
        if version != "sample":
            phases.linger("generator", "publishing", snapshot.version[1])
            self._at_update = parse_version(version)[1]
        return super().load(snapshot, version, offer)
