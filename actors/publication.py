"""What is published, and whether an engine holds it: the probe that engine and learner both score."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.episodes import version_label
from actors.fleet import Version


@dataclass(frozen=True)
class Probe:
    """Sequences, and the learner's log-probabilities, at temperature 1, of each one's tokens after the first.

    No token may be further than `bound_nats` from what an engine says of it. The engine's context must hold each
    sequence and one token more.
    """

    sequences: list[list[int]]
    logprobs: list[list[float]]
    bound_nats: float


@dataclass(frozen=True)
class Publication:
    """What came of publishing one version: seconds until it was admitted, the longest standstill of a generator, and
    the largest and the mean difference between engine and learner on the probe's tokens, over all generators. `roles`
    are metrics of generators and scoring processes since the publication before, of those that reported, and of the
    fleet."""

    seconds: float
    pause_s: float
    probe_nats: float
    probe_mean_nats: float
    roles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """How a generator took a version: its standstill in seconds, and how far its probe is from the learner, by token
    (nats)."""

    pause_s: float
    nats: np.ndarray

    def is_within(self, probe: Probe) -> bool:
        """Whether engine and learner agree; not a number is no agreement."""
        return bool(self.nats.max() <= probe.bound_nats)


@dataclass
class Published:
    """The newest version: what every generator must hold that serves from now on, and those that took it, by name."""

    version: Version
    probe: Probe
    fits: dict[str, Fit] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Generators that hold it and disagree with the learner, and the sentence that says so."""

    @property
    def label(self) -> str:
        """What engines call it."""
        return version_label(*self.version)

    def note(self, name: str, pause_s: float, scored: list[list[float]]) -> bool:
        """Note how a generator took the version; returns whether engine and learner agree."""
        fit = Fit(pause_s, differences(scored, self.probe.logprobs))
        if fit.is_within(self.probe):
            self.fits[name] = fit
            return True
        self.refused[name] = (
            f"{name} holds weights {self.label} but scores the probe {fit.nats.max():.4g} nats away from the "
            f"learner, beyond the bound of {self.probe.bound_nats:g}: weights and engine do not fit together."
        )
        return False

    def outcome(self, seconds: float, roles: dict[str, float]) -> Publication:
        """What is told of it, once a generator took it."""
        every = np.concatenate([fit.nats for fit in self.fits.values()])
        pause_s = max(fit.pause_s for fit in self.fits.values())
        return Publication(seconds, pause_s, float(every.max()), float(every.mean()), roles)


def differences(scored: list[list[float]], logprobs: list[list[float]]) -> np.ndarray:
    """Of every token of every sequence, in nats."""
    pairs: list[Any] = [pair for rows in zip(scored, logprobs, strict=True) for pair in zip(*rows, strict=True)]
    return np.abs(np.array([engine - learner for engine, learner in pairs]))
