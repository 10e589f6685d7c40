"""The rollout generator: one vLLM engine in one actor, fed by the stream, emptied into scorer and reference.

Everything that touches the engine happens on one thread, so a change of weights falls between two steps and needs no
lock. The actor's methods only put commands into that thread's queue and wait for their answers.

Kinds of command: those that may run between any two steps (new weights, a probe), the generator's own (a lease that
was granted), and exclusive ones (a batch of samples under other weights), for which leasing pauses until the engine
has run dry.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from actors.episodes import GENERATED, Chunk, parse_version
from actors.role_reports import RoleReport, report_now
from actors.rollout_engine import Completion, Request, RolloutEngine, probe_request
from actors.settings import RolloutSettings, SamplingSettings
from corpus.problems import RunProblem
from corpus.schemas import make_table
from corpus.templates import decode_responses
from models.snapshot import Snapshot, pack

LEASE_WAIT_S = 20.0
"""How long one lease call waits at the stream before it is renewed."""


@dataclass(frozen=True)
class Work:
    """What a generator needs to take part in a PPO stage: the actors it talks to and how it samples."""

    run: str
    round_number: int
    stream: Any
    conductor: Any
    scorers: list[Any]
    references: list[Any]
    sampling: SamplingSettings


@dataclass
class _OpenChunk:
    chunk: Chunk
    done: dict[int, Completion] = field(default_factory=dict)


@ray.remote(num_cpus=1, max_concurrency=16)  # pyright: ignore[reportCallIssue]
class RolloutGenerator:
    """One engine. Run-agnostic: weights and work are given to it."""

    def __init__(self, name: str, settings: RolloutSettings) -> None:
        self._name = name
        self._settings = settings
        self._engine: RolloutEngine | None = None
        self._tokenizer: Any = None
        self._commands: queue.Queue[tuple[str, Callable[[], Any], Future[Any]]] = queue.Queue()
        self._exclusive: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._work: Work | None = None
        self._leasing = False
        self._chunk_size = 1
        self._open: dict[int, _OpenChunk] = {}
        self._probes: dict[str, Future[list[float]]] = {}
        self._current: tuple[Snapshot, str] | None = None
        self._busy_s = 0.0
        self._response_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # what others call --------------------------------------------------------------------------------------------

    def start(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> str:
        """Make the engine for the architecture (and weights) in `model_directory`; returns this generator's name."""
        return self._do("between", lambda: self._start(model_directory, tokenizer, max_sequence_tokens))

    def load(self, snapshot: Snapshot, label: str) -> float:
        """Change weights between two steps; returns the seconds generation stood still."""
        return self._do("between", lambda: self._load(snapshot, label))

    def load_directory(self, directory: str, label: str) -> float:
        """Load the weights of a Hugging Face directory of the same architecture."""
        return self._do("exclusive", lambda: self._load(snapshot_of_directory(directory), label))

    def probe(self, tokens: list[int]) -> list[float]:
        """The engine's log-probabilities, at temperature 1, of `tokens` after the first, under the present weights."""
        answer: Future[list[float]] = Future()
        self._do("between", lambda: self._submit_probe(tokens, answer))
        return answer.result()

    def sample(
        self, prompts: pa.Table, samples: int, sampling: SamplingSettings, seed: int, snapshot: list[Any] | None = None
    ) -> pa.Table:
        """`samples` responses to each prompt as a samples table, under the present weights, or under those of the
        snapshot (a reference in a list) with the present ones put back afterwards."""
        other: Any = ray.get(snapshot[0]) if snapshot else None
        return self._do("exclusive", lambda: self._sample(prompts, samples, sampling, seed, other))

    def work(self, work: Work) -> None:
        """Take part in a PPO stage: lease, generate, send to scoring, until `rest`."""
        self._do("between", lambda: self._begin(work))

    def rest(self) -> None:
        """Stop taking part, once what is in the engine is done."""
        self._do("exclusive", self._end)

    def report(self) -> RoleReport:
        """What this engine has done since it started: its tokens are those of finished responses."""
        return report_now(self._busy_s, self._response_tokens)

    def _do(self, kind: str, command: Callable[[], Any]) -> Any:
        answer: Future[Any] = Future()
        self._commands.put((kind, command, answer))
        return answer.result()

    # the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._take_commands(wait=self._idle())
                if self._exclusive and not self._pending():
                    command, answer = self._exclusive.pop(0)
                    _answer(command, answer)
                    continue
                self._maybe_lease()
                if self._pending():
                    self._step()
        except Exception as problem:  # noqa: BLE001 - this thread is the generator: whoever waits for it must be told
            self._fail(problem)

    def _idle(self) -> bool:
        return not self._pending() and not self._exclusive

    def _pending(self) -> int:
        return self._engine.pending if self._engine is not None else 0

    def _take_commands(self, wait: bool) -> None:
        """Run what may run between steps, put aside what is exclusive; with `wait`, block for the first command."""
        while True:
            try:
                kind, command, answer = self._commands.get(block=wait, timeout=1.0 if wait else None)
            except queue.Empty:
                return
            wait = False
            if kind == "exclusive":
                self._exclusive.append((command, answer))
            elif kind == "own":
                command()  # nobody waits for its answer: what it raises is this generator's failure
            else:
                _answer(command, answer)

    def _fail(self, problem: BaseException) -> None:
        if self._work is not None:
            told = problem if isinstance(problem, RunProblem) else RunProblem(f"{self._name} failed: {problem!r}")
            self._work.conductor.failed.remote(self._name, told)
        refusal = RunProblem(f"{self._name} has failed: {problem!r}")
        for waiting in (*self._probes.values(), *(answer for _, answer in self._exclusive)):
            waiting.set_exception(refusal)
        while True:
            self._commands.get()[2].set_exception(refusal)

    def _start(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> str:
        if self._engine is not None:
            raise RunProblem(f"{self._name} has an engine already.")
        from models.build import load_tokenizer

        self._tokenizer = load_tokenizer(tokenizer)
        self._engine = RolloutEngine(model_directory, self._settings, max_sequence_tokens)
        warm_up = [
            Request(f"warm-{row}", [self._tokenizer.eos_token_id] * 4, 4, 1.0, seed=row)
            for row in range(min(8, self._settings.max_concurrent))
        ]
        self._engine.run(warm_up)  # the first steps allocate and dispatch: not to be paid by the first episodes
        return self._name

    def _ready_engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RunProblem(f"{self._name} was given work before it was started.")
        return self._engine

    def _load(self, snapshot: Snapshot, label: str) -> float:
        pause_s = self._ready_engine().load(snapshot, label)
        self._current = (snapshot, label)
        return pause_s

    def _submit_probe(self, tokens: list[int], answer: "Future[list[float]]") -> None:
        key = f"probe-{time.monotonic_ns()}"
        self._probes[key] = answer
        self._ready_engine().submit(probe_request(key, tokens))

    def _sample(
        self, prompts: pa.Table, samples: int, sampling: SamplingSettings, seed: int, other: Snapshot | None
    ) -> pa.Table:
        engine = self._ready_engine()
        if other is not None:
            engine.load(other, "sample")
        ids, tokens = prompts["prompt_id"].to_pylist(), prompts["prompt_tokens"].to_pylist()
        rows = [(row, sample) for row in range(len(ids)) for sample in range(samples)]
        requests = [
            Request(
                f"{row}/{sample}",
                tokens[row],
                sampling.max_response_tokens,
                sampling.temperature,
                seed=sample_seed(seed, ids[row], sample),
                top_p=sampling.top_p,
            )
            for row, sample in rows
        ]
        started = time.perf_counter()
        completions = engine.run(requests)
        self._busy_s += time.perf_counter() - started
        self._response_tokens += sum(len(completion.tokens) for completion in completions)
        if other is not None and self._current is not None:
            engine.load(*self._current)
        return make_table(
            "samples",
            {
                "prompt_id": [ids[row] for row, _ in rows],
                "sample": [sample for _, sample in rows],
                "prompt_tokens": [tokens[row] for row, _ in rows],
                "response_tokens": [completion.tokens for completion in completions],
                "response": decode_responses(self._tokenizer, [completion.tokens for completion in completions]),
                "logprobs": [completion.logprobs for completion in completions],
                "finish_reason": [completion.finish_reason for completion in completions],
            },
        )

    # work for the stream -----------------------------------------------------------------------------------------

    def _begin(self, work: Work) -> None:
        self._work, self._leasing = work, False

    def _end(self) -> None:
        self._work = None

    def _maybe_lease(self) -> None:
        """Ask the stream for as many chunks as there is room for; its answer arrives as a command."""
        if self._work is None or self._leasing or self._exclusive:
            return
        room = self._settings.max_concurrent - self._pending()
        chunks = max(room // self._chunk_size, 0 if self._pending() else 1)
        if chunks == 0:
            return
        self._leasing, work = True, self._work
        future = work.stream.lease.remote(self._name, chunks, LEASE_WAIT_S).future()
        future.add_done_callback(lambda done: self._commands.put(("own", lambda: self._admit(done, work), Future())))

    def _admit(self, leased: "Future[list[Chunk]]", work: Work) -> None:
        if work is not self._work:
            return  # of work that is over: its stream is gone or going, and what the call came to is nobody's concern
        self._leasing = False
        chunks, engine = leased.result(), self._ready_engine()
        for chunk in chunks:
            self._chunk_size = len(chunk.slots)
            self._open[chunk.slots[0].index] = _OpenChunk(chunk)
            for slot in chunk.slots:
                key = f"slot/{chunk.slots[0].index}/{slot.index}"
                sampling = work.sampling
                engine.submit(
                    Request(key, slot.prompt_tokens, sampling.max_response_tokens, sampling.temperature, slot.seed)
                )

    def _step(self) -> None:
        started = time.perf_counter()
        completions = self._ready_engine().step()
        self._busy_s += time.perf_counter() - started
        for completion in completions:
            kind, _, rest = completion.key.partition("/")
            if kind != "slot":
                logprobs = completion.prompt_logprobs
                assert logprobs is not None
                self._probes.pop(completion.key).set_result(logprobs.tolist())
                continue
            self._response_tokens += len(completion.tokens)
            first, _, slot = rest.partition("/")
            opened = self._open[int(first)]
            opened.done[int(slot)] = completion
            if len(opened.done) == len(opened.chunk.slots):
                del self._open[int(first)]
                self._send(opened)

    def _send(self, opened: _OpenChunk) -> None:
        """Hand a generated chunk to scorer, reference and stream by reference; the rows never come back here."""
        work = self._work
        assert work is not None
        episodes = ray.put(self._episodes(opened, work))
        which = opened.chunk.slots[0].index // len(opened.chunk.slots)
        scores = work.scorers[which % len(work.scorers)].score.remote(episodes)
        reference = work.references[which % len(work.references)]
        logprobs = reference.reference_logprobs.remote(episodes, work.sampling.temperature)
        accepted = work.stream.accept.remote(episodes, scores, logprobs).future()
        accepted.add_done_callback(lambda done: self._check_accepted(done, work))

    def _check_accepted(self, done: "Future[int]", work: Work) -> None:
        problem = done.exception()
        if problem is not None:
            work.conductor.failed.remote(self._name, problem)

    def _episodes(self, opened: _OpenChunk, work: Work) -> pa.RecordBatch:
        chunk, now = opened.chunk, time.time()
        done = [opened.done[slot.index] for slot in chunk.slots]
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
            "run": [work.run] * count,
            "round": [work.round_number] * count,
            "slot": [slot.index for slot in chunk.slots],
            "sample": [0] * count,
            "attempt": [chunk.attempt] * count,
            "prompt_id": [slot.prompt_id for slot in chunk.slots],
            "prompt_tokens": [slot.prompt_tokens for slot in chunk.slots],
            "response_tokens": [completion.tokens for completion in done],
            "behaviour_logprobs": [completion.logprobs for completion in done],
            "version_spans": spans,
            "finish_reason": [completion.finish_reason for completion in done],
            "generator": [self._name] * count,
            "leased_at": [chunk.leased_at] * count,
            "generated_at": [now] * count,
        }
        return pa.RecordBatch.from_pydict(columns, schema=GENERATED)


def _answer(command: Callable[[], Any], answer: "Future[Any]") -> None:
    """Run a command for its caller; what it raises is the caller's, and the engine goes on."""
    try:
        answer.set_result(command())
    except Exception as problem:  # noqa: BLE001 - handed to whoever asked
        answer.set_exception(problem)


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one sample outside PPO: a 63-bit hash of (seed, prompt, sample)."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def snapshot_of_directory(directory: str) -> Snapshot:
    """The weights of a Hugging Face directory (safetensors) as a snapshot of version (0, 0)."""
    from safetensors.torch import load_file

    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise RunProblem(f"There are no safetensors weights in {directory}.")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return pack(state, (0, 0))
