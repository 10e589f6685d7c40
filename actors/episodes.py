"""The episode: what a rollout is while it travels from generator over scorer and reference to the learner.

One schema, here. Episodes travel as Arrow record batches; the stream writes them to Parquet, the audit trail.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1

SPAN = pa.struct([("attempt", pa.int32()), ("update", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])

GENERATED = pa.schema(
    [
        ("run", pa.string()),
        ("round", pa.int32()),
        ("slot", pa.int64()),
        ("sample", pa.int32()),
        ("attempt", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("version_spans", pa.list_(SPAN)),
        ("finish_reason", pa.string()),
        ("generator", pa.string()),
        ("leased_at", pa.float64()),
        ("generated_at", pa.float64()),
    ],
    metadata={b"schema_version": str(SCHEMA_VERSION).encode()},
)
"""An episode as a generator hands it on. Times are Unix seconds; log-probs are nats at the rollout temperature."""

EPISODE = pa.schema(
    [
        *GENERATED,
        ("score", pa.float32()),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("accepted_at", pa.float64()),
    ],
    metadata=GENERATED.metadata,
)
"""An episode that can be trained on: with the reward model's score and the reference's log-probs of its tokens."""


@dataclass(frozen=True)
class Slot:
    """Slot `index` of the run's seeded order: the prompt it owns and the seed its response is drawn with."""

    index: int
    prompt_id: str
    prompt_tokens: list[int]
    seed: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive slots leased together; they are scored in one batch, so its composition never varies."""

    slots: list[Slot]
    attempt: int
    leased_at: float


def episode_seed(run_seed: int, round_number: int, slot: int, sample: int = 0) -> int:
    """The sampling seed of an episode: a 63-bit hash of (run, round, slot, sample), the same on every machine."""
    text = f"{run_seed}/{round_number}/{slot}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class PromptOrder:
    """The run's seeded order of prompts: slot i belongs to prompt `self[i]`; every pass is a new permutation."""

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, slot: int) -> int:
        """The row of the prompt table that owns `slot`."""
        which, place = divmod(slot, self._prompts)
        if which not in self._passes:
            self._passes[which] = np.random.default_rng((self._seed, which)).permutation(self._prompts)
        return int(self._passes[which][place])


def version_label(attempt: int, update: int) -> str:
    """The name that an engine gives the weights of (attempt, update)."""
    return f"{attempt}.{update}"


def parse_version(label: str) -> tuple[int, int]:
    """(attempt, update) of a `version_label`."""
    attempt, update = label.split(".")
    return int(attempt), int(update)


def oldest_weights(episodes: pa.RecordBatch | pa.Table) -> list[tuple[int, int]]:
    """(attempt, update) of the oldest weights that wrote a token of each episode (every response has a token)."""
    spans_of_each = episodes.column("version_spans").to_pylist()
    return [min((span["attempt"], span["update"]) for span in spans) for spans in spans_of_each]


def with_scores(
    episodes: pa.RecordBatch,
    scores: Sequence[float],
    reference_logprobs: Sequence[Sequence[float]] | pa.Array,
    accepted_at: float,
) -> pa.RecordBatch:
    """`episodes` (GENERATED) and what scorer and reference said of them, as EPISODE rows in the same order."""
    columns = [
        *episodes.columns,
        pa.array(scores, pa.float32()),
        pa.array(reference_logprobs, pa.list_(pa.float32())),
        pa.array([accepted_at] * episodes.num_rows, pa.float64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=EPISODE)
