"""The chunks that a generator holds, from the lease until their last response is there. Pure: no engine, no threads."""

import time
from dataclasses import dataclass, field

import pyarrow as pa

from actors.episodes import GENERATED, Chunk, parse_version
from actors.rollout_engine import Completion, Request
from actors.settings import SamplingSettings

KIND = "slot"
"""First part of the keys of requests that belong to slots."""


@dataclass
class OpenChunk:
    """A chunk and those of its responses that are there, by slot."""

    chunk: Chunk
    done: dict[int, Completion] = field(default_factory=dict)
    generated_at: float = 0.0
    """When the last of them was there, in Unix seconds."""

    @property
    def versions(self) -> set[str]:
        """The weights that wrote a token of those responses."""
        return {span.version for completion in self.done.values() for span in completion.spans}

    def requests(self, sampling: SamplingSettings) -> list[Request]:
        """One request a slot. Keys name the attempt, so that what an abandoned one left behind belongs to nobody."""
        return [
            Request(key, slot.prompt_tokens, sampling.max_response_tokens, sampling.temperature, slot.seed)
            for key, slot in zip(self.keys(), self.chunk.slots, strict=True)
        ]

    def keys(self) -> list[str]:
        """The keys of `requests`."""
        first, attempt = self.chunk.slots[0].index, self.chunk.attempt
        return [f"{KIND}/{attempt}/{first}/{slot.index}" for slot in self.chunk.slots]

    def episodes(self, run: str, round_number: int, generator: str) -> pa.RecordBatch:
        """The chunk's episodes (GENERATED), in slot order, once every response is there."""
        chunk = self.chunk
        done = [self.done[slot.index] for slot in chunk.slots]
        count = len(done)
        spans = [
            [
                {"attempt": attempt, "update": update, "start": span.start, "end": span.end}
                for span in completion.spans
                for attempt, update in [parse_version(span.version)]
            ]
            for completion in done
        ]
        columns = {
            "run": [run] * count,
            "round": [round_number] * count,
            "slot": [slot.index for slot in chunk.slots],
            "sample": [0] * count,
            "attempt": [chunk.attempt] * count,
            "prompt_id": [slot.prompt_id for slot in chunk.slots],
            "prompt_tokens": [slot.prompt_tokens for slot in chunk.slots],
            "response_tokens": [completion.tokens for completion in done],
            "behaviour_logprobs": [completion.logprobs for completion in done],
            "version_spans": spans,
            "finish_reason": [completion.finish_reason for completion in done],
            "generator": [generator] * count,
            "leased_at": [chunk.leased_at] * count,
            "generated_at": [self.generated_at] * count,
        }
        return pa.RecordBatch.from_pydict(columns, schema=GENERATED)


class OpenChunks:
    """By the first slot of each."""

    def __init__(self) -> None:
        self._open: dict[int, OpenChunk] = {}

    @property
    def slots(self) -> int:
        """Slots of all open chunks together."""
        return sum(len(each.chunk.slots) for each in self._open.values())

    def add(self, chunk: Chunk) -> OpenChunk | None:
        """Open a chunk that was leased. None where it is open already: its lease ran out under way and was granted
        again to the same generator, which goes on with what it has."""
        first = chunk.slots[0].index
        if first in self._open:
            return None
        self._open[first] = OpenChunk(chunk)
        return self._open[first]

    def complete(self, completion: Completion) -> OpenChunk | None:
        """Note a response; returns its chunk, which is closed, where it was the last one of it."""
        _, attempt, first, slot = completion.key.split("/")
        opened = self._open.get(int(first))
        if opened is None or opened.chunk.attempt != int(attempt):
            return None
        opened.done[int(slot)] = completion
        if len(opened.done) < len(opened.chunk.slots):
            return None
        opened.generated_at = time.time()
        return self._open.pop(int(first))

    def abandon_but(self, attempt: int | None) -> list[str]:
        """Forget chunks of any attempt but `attempt`, whose delivery would be refused; returns their requests' keys."""
        old = [first for first, each in self._open.items() if each.chunk.attempt != attempt]
        return [key for first in old for key in self._open.pop(first).keys()]  # noqa: SIM118 - no dict


def chunks_to_lease(held: int, pending: int, chunk_size: int, share: int, max_concurrent: int) -> int:
    """Chunks that a generator has room for, which holds `held` slots of its share of `share`, and whose engine works on
    `pending` requests of at most `max_concurrent`. One that holds nothing always takes a chunk."""
    room = min(max_concurrent - pending, share - held)
    return max(room // chunk_size, 0 if held else 1)
