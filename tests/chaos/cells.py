"""The cells of the chaos matrix: who is struck, in which phase, and how."""

from dataclasses import dataclass
from typing import Literal

PHASES = ("idle", "generating", "publishing", "checkpointing")
WORKERS = ("generator", "scorer", "reference", "learner")
"""Roles that are replaced while the run goes on; every other one ends the command, and the same command continues."""
ROLES = (*WORKERS, "stream", "conductor", "weight store", "driver")

How = Literal["SIGKILL", "SIGSTOP", "scaled in", "full disk", "truncated shard", "wrong hash"]

HOLDERS = {
    "idle": ("learner",),
    "generating": ("generator", "scorer", "reference", "stream"),
    "publishing": ("generator", "weight store", "stream"),
    "checkpointing": ("learner", "stream"),
}
"""By phase: roles that have a part of their own in it and can hold it open; the first does for every other role."""


@dataclass(frozen=True)
class Cell:
    """One strike."""

    role: str
    phase: str
    how: How
    engine: Literal["torch", "vLLM"] = "torch"
    stale: bool = False
    """Whether rollouts go on while weights are published (staleness 1), to two learner ranks (ZeRO 1)."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.phase}-{self.what}".replace(", ", "-").replace(" ", "-")

    @property
    def what(self) -> str:
        """How, and on which engine and at which staleness where these are not the usual ones."""
        usual = (self.engine == "torch", not self.stale)
        named = (self.engine, "staleness 1")
        return ", ".join([self.how, *(name for name, holds in zip(named, usual, strict=True) if not holds)])

    @property
    def holder(self) -> str:
        """The role whose process holds the phase open."""
        return self.role if self.role in HOLDERS[self.phase] else HOLDERS[self.phase][0]

    @property
    def target(self) -> str:
        """The role that must be there for the strike, and gets the signal, if there is one."""
        return "driver" if self.role in ("checkpoint", "disk") else self.role

    @property
    def survives(self) -> bool:
        """Whether the command itself must come to its end; else it may stop, with a sentence, and be given again."""
        return self.role in WORKERS


KILLS = [Cell(role, phase, "SIGKILL") for role in ROLES for phase in PHASES]
STOPS = [Cell(role, phase, "SIGSTOP") for role in WORKERS for phase in PHASES]
OTHERS = [
    Cell("checkpoint", "idle", "truncated shard"),
    Cell("checkpoint", "idle", "wrong hash"),
    Cell("disk", "idle", "full disk"),
    Cell("disk", "checkpointing", "full disk"),
    Cell("node", "generating", "SIGKILL"),
]
REAL = [Cell(role, "generating", "SIGKILL", "vLLM") for role in ROLES]
STALE = [
    *(Cell("generator", phase, "scaled in", stale=True) for phase in ("generating", "publishing")),
    *(Cell(role, phase, "SIGKILL", stale=True) for role in ("generator", "learner") for phase in PHASES),
    *(Cell(role, "publishing", "SIGKILL", stale=True) for role in ("scorer", "reference")),
    *(Cell(role, "generating", "SIGSTOP", stale=True) for role in WORKERS),
    *(Cell(role, "publishing", "SIGKILL", stale=True) for role in ("stream", "conductor", "weight store", "driver")),
]
CAMPAIGNS = {"torch": [*KILLS, *STOPS], "vLLM": REAL, "staleness 1": STALE}
"""Cells that are played on one run, one after another: by its generators' engine, or its staleness."""
ALL = [*KILLS, *STOPS, *OTHERS, *REAL, *STALE]

FAST = [Cell("learner", "checkpointing", "SIGKILL")]
"""What `make test` plays: the command goes on."""
ENDS = [Cell("stream", "generating", "SIGKILL")]
"""What `make test-extended` plays beside: the command ends and is given again."""
