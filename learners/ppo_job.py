"""What a PPO stage is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.conductor import HeldOut
from actors.settings import SamplingSettings
from corpus.stored_directory import StoredDirectory
from learners.engine import EngineSettings
from learners.ppo_settings import PpoSettings
from learners.tracking import Tracked


@dataclass(frozen=True)
class PpoJob:
    """What the PPO stage reads, where it writes, and the actors it talks to. Paths are absolute."""

    identity: str
    """Hash of all that the stage reads; only a checkpoint of the same identity is continued."""
    settings: PpoSettings
    sampling: SamplingSettings
    engine: EngineSettings
    seed: int
    directory: Path
    tokenizer: str
    policy: str
    """Directory of the initial policy, which is the reference too."""
    reward_model: str
    """Directory from which the value network starts."""
    pretraining: Path
    stream: Any
    conductor: Any
    rollout_dtype: str
    rollout_transport: str
    answer_deadline_s: float
    """Seconds until stream or conductor, who say nothing at all, are given up: above every deadline that they keep
    themselves, which tell more."""
    held_out: HeldOut
    kv_kept: bool = False
    """Whether engines keep the keys and values of running responses when weights change."""
    stored: StoredDirectory | None = None
    """Where an object store keeps the run; None where the directory itself is the run's."""
    tracked: Tracked | None = None
    """The tracker that metrics go to beside files; None for none."""
