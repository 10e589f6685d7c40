"""The rollout generator: one vLLM engine in one actor, fed by the stream, emptied into scorer and reference.

Everything that touches the engine happens on one thread, so a change of weights falls between two steps and needs no
lock. The actor's methods only put commands into that thread's queue and wait for their answers.

What it writes under weights that were published is delivered once the conductor confirms them, because engine and
learner agree: until then chunks that are whole are held, and none is leased. Who disagrees delivers nothing of it.

Kinds of command: those that may run between any two steps (new weights, a probe), the generator's own (a lease that
was granted), and exclusive ones (a batch of samples under other weights), for which leasing pauses until the engine
has run dry.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.delivery import Delivery, ScoringPools, Unscored, Work
from actors.episodes import Chunk
from actors.exported_metrics import GENERATOR_PAUSE
from actors.failures import expected_problem, plain_problem, worker_broke
from actors.open_chunks import KIND, OpenChunk, OpenChunks, chunks_to_lease
from actors.pulse import Pulse, pulse_now
from actors.role_reports import RoleReport, report_now
from actors.rollout_engine import Request, RolloutEngine, probe_request
from actors.samples import sample_requests, samples_table
from actors.settings import RolloutSettings, SamplingSettings
from actors.telemetry import worker_telemetry
from corpus import logs
from corpus.problems import RunProblem
from models.snapshot import Snapshot, pack

log = logging.getLogger(__name__)

LEASE_WAIT_S = 20.0
"""How long one lease call waits at the stream before it is renewed."""

CALLS = 16
"""Calls that are carried out at once."""

COMMANDS = 2 * CALLS
"""Commands that may wait for the engine: one of each call, and a lease that was granted. One more is a mistake."""

ENGINE_DEADLINE_S = 1800.0
"""Seconds without the end of a step or a command after which whoever waits for the engine is told: above the longest
start, load or step. Callers have deadlines of their own for the whole."""

FETCH_DEADLINE_S = 300.0
"""Seconds for a snapshot to come out of the object store."""


@ray.remote(num_cpus=1, max_concurrency=CALLS, concurrency_groups={"health": 1})  # pyright: ignore[reportCallIssue]
class RolloutGenerator:
    """One engine. Run-agnostic: weights and work are given to it."""

    def __init__(self, name: str, settings: RolloutSettings) -> None:
        logs.begin("generator", name)
        self._name = name
        self._settings = settings
        self._engine: RolloutEngine | None = None
        self._tokenizer: Any = None
        self._commands: queue.Queue[tuple[str, Callable[[], Any], Future[Any]]] = queue.Queue(COMMANDS)
        self._exclusive: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._work: Work | None = None
        self._delivery = Delivery(name)
        self._share = 0
        self._leasing = False
        self._open = OpenChunks()
        self._held: list[OpenChunk] = []
        """Chunks that are whole, with tokens of weights that are not confirmed."""
        self._unconfirmed: set[str] = set()
        """Published weights that were loaded and not confirmed."""
        self._half_loaded = False
        """Whether a load has failed, or is under way: the engine may hold any weights."""
        self._probes: dict[str, Future[list[float]]] = {}
        self._current: tuple[Snapshot, str] | None = None
        self._busy_s = 0.0
        self._response_tokens = 0
        self._telemetry = worker_telemetry("generator", name)
        self._progressed_at = time.monotonic()
        self._under_way = False
        """Whether a command is being carried out."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # what others call --------------------------------------------------------------------------------------------

    def start(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> str:
        """Make the engine for the architecture (and weights) in `model_directory`; returns this generator's name."""
        return self._do("between", lambda: self._start(model_directory, tokenizer, max_sequence_tokens), "its start")

    def load(self, snapshot: Snapshot, label: str, offer: dict[str, Any] | None = None) -> float:
        """Change weights between two steps, through the learner's GPU where it makes an offer; returns the seconds
        generation stood still. What they write is held until `confirm`; where it raises, nothing that is under way is
        ever delivered."""
        return self._do(
            "between", lambda: self._load_published(snapshot, label, offer), f"weights {label} to be loaded"
        )

    def confirm(self, label: str) -> None:
        """Engine and learner agree on weights `label`: what they write may be delivered."""
        self._do("between", lambda: self._confirm(label), f"weights {label} to be confirmed")

    def load_directory(self, directory: str, label: str) -> float:
        """Load the weights of a Hugging Face directory of the same architecture."""
        what = f"weights {label} to be loaded"
        return self._do("exclusive", lambda: self._load(snapshot_of_directory(directory), label), what)

    def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        """The engine's log-probabilities, at temperature 1 and under the present weights, of each sequence's tokens
        after the first. The engine's context must hold each sequence and one token more."""
        answers: list[Future[list[float]]] = [Future() for _ in sequences]
        self._do("between", lambda: self._submit_probes(sequences, answers), "a probe to begin")
        return [self._await(answer, "a probe") for answer in answers]

    def sample(
        self, prompts: pa.Table, samples: int, sampling: SamplingSettings, seed: int, snapshot: list[Any] | None = None
    ) -> pa.Table:
        """`samples` responses to each prompt as a samples table, under the present weights, or under those of the
        snapshot (a reference in a list) with the present ones put back afterwards, whatever happens."""
        other = self._fetch(snapshot[0]) if snapshot else None
        return self._do("exclusive", lambda: self._sample(prompts, samples, sampling, seed, other), "samples")

    def work(self, work: Work) -> None:
        """Take part in a PPO stage: lease, generate, send to scoring, until `rest`."""
        self._do("between", lambda: self._begin(work), "its work to begin")

    def rest(self) -> None:
        """Stop taking part, once what is in the engine is done."""
        self._do("exclusive", self._end, "its last responses")

    def adjust(self, share: int, pools: ScoringPools) -> None:
        """From now on hold at most `share` slots at once, and have chunks scored by `pools`."""
        self._share, self._delivery.pools = share, pools

    @ray.method(concurrency_group="health")  # answered whatever else is under way
    def heartbeat(self) -> Pulse:
        """A sign of life, which also says for how long the engine has ended no step and no command."""
        engine = self._engine
        stands_still = self._under_way or bool(engine is not None and engine.pending)
        progressed_at = max(self._progressed_at, engine.stepped_at if engine is not None else 0.0)
        pulse = pulse_now(time.monotonic() - progressed_at if stands_still else 0.0)
        self._telemetry.at_work(self._busy_s, self._response_tokens, pulse.memory_bytes, pulse.stalled_s)
        return pulse

    def report(self) -> RoleReport:
        """What this engine has done since it started: its tokens are those of finished responses."""
        return report_now(self._busy_s, self._response_tokens)

    def _do(self, kind: str, command: Callable[[], Any], what: str) -> Any:
        answer: Future[Any] = Future()
        self._commands.put_nowait((kind, command, answer))
        return self._await(answer, what)

    def _await(self, answer: "Future[Any]", what: str) -> Any:
        """What the engine's thread answers. Raises RunProblem where the engine has come to a standstill."""
        began = time.monotonic()
        while True:
            done, _ = wait([answer], timeout=min(1.0, ENGINE_DEADLINE_S))
            if done:
                return answer.result()
            progressed_at = max(began, self._progressed_at, self._engine.stepped_at if self._engine else 0.0)
            if time.monotonic() - progressed_at > ENGINE_DEADLINE_S:
                raise RunProblem(
                    f"Waited for {what} of {self._name}, whose engine has ended no step and no command for "
                    f"{ENGINE_DEADLINE_S:.0f} s.",
                    "run/no-answer",
                )

    def _fetch(self, reference: Any) -> Snapshot:
        try:
            return ray.get(reference, timeout=FETCH_DEADLINE_S)
        except GetTimeoutError as error:
            raise RunProblem(
                f"{self._name} waited {FETCH_DEADLINE_S:.0f} s for the weights to sample under, which the weight store "
                "put into the object store.",
                "publication/lost",
            ) from error
        except RayError as error:
            problem = expected_problem(error, {}, self._name, "it had the weights to sample under")
            if problem is None:
                raise
            raise problem from error

    # the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._take_commands(wait=self._idle())
                if self._may_be_exclusive():
                    command, answer = self._exclusive.pop(0)
                    self._answer(command, answer)
                    continue
                self._maybe_lease()
                if self._pending():
                    self._step()
        except Exception as problem:  # noqa: BLE001 - this thread is the generator: whoever waits for it must be told
            self._fail(problem)

    def _may_be_exclusive(self) -> bool:
        return bool(self._exclusive) and not self._pending() and not self._held

    def _idle(self) -> bool:
        return not self._pending() and not self._may_be_exclusive()

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
                self._answer(command, answer)

    def _answer(self, command: Callable[[], Any], answer: "Future[Any]") -> None:
        """Run a command for its caller; what it raises is the caller's, and the engine goes on."""
        self._progressed_at, self._under_way = time.monotonic(), True
        try:
            answer.set_result(command())
        except Exception as problem:  # noqa: BLE001 - handed to whoever asked
            answer.set_exception(problem)
        finally:
            self._progressed_at, self._under_way = time.monotonic(), False

    def _fail(self, problem: BaseException) -> None:
        names = self._work.names() if self._work is not None else {}
        aim, doing = f"{self._name} had slots to generate", f"{self._name} failed"
        told = plain_problem(problem, names, "the episode stream", aim, doing)
        refusal = RunProblem(f"{self._name} has failed: {told}", "fleet/generator-failed")
        # What is no expected problem may be this process's own: another is tried.
        if expected_problem(problem, names, "", aim) is None:
            told = refusal = worker_broke(self._name, "generated", problem)
        if self._work is not None:
            getattr(self._work.conductor, "broke" if told is refusal else "failed").remote(self._name, told)
        for waiting in (*self._probes.values(), *(answer for _, answer in self._exclusive)):
            waiting.set_exception(refusal)
        while True:
            self._commands.get()[2].set_exception(refusal)

    def _start(self, model_directory: str, tokenizer: str, max_sequence_tokens: int) -> str:
        if self._engine is not None:
            raise RunProblem(f"{self._name} has an engine already.", "fleet/order")
        from models.build import load_tokenizer

        self._tokenizer = load_tokenizer(tokenizer)
        self._engine = RolloutEngine(model_directory, self._settings, max_sequence_tokens)
        self._engine.when_a_part_is_lost(self._die)
        warm_up = [
            Request(f"warm-{row}", [self._tokenizer.eos_token_id] * 4, 4, 1.0, seed=row)
            for row in range(min(8, self._settings.max_concurrent))
        ]
        self._engine.run(warm_up)  # the first steps allocate and dispatch: not to be paid by the first episodes
        return self._name

    def _die(self) -> None:
        """Die as a whole: the conductor puts another in the place of an actor that is dead, not of half a one."""
        log.error("%s has lost a process that holds a part of its model, and ends", self._name)
        os._exit(1)

    def _ready_engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RunProblem(f"{self._name} was given work before it was started.", "fleet/order")
        return self._engine

    def _load(self, snapshot: Snapshot, label: str, offer: dict[str, Any] | None = None) -> float:
        pause_s = self._ready_engine().load(snapshot, label, offer)
        self._current = (snapshot, label)
        self._telemetry.observe(GENERATOR_PAUSE, pause_s)
        return pause_s

    def _load_published(self, snapshot: Snapshot, label: str, offer: dict[str, Any] | None) -> float:
        self._unconfirmed.add(label)
        self._half_loaded = True
        try:
            pause_s = self._load(snapshot, label, offer)
        except Exception:
            self._abandon_but(None)  # the engine may call by the old name what is partly new
            raise
        self._half_loaded = False
        return pause_s

    def _confirm(self, label: str) -> None:
        self._unconfirmed.discard(label)
        held, self._held = self._held, []
        for each in held:
            self._send(each)

    def _submit_probes(self, sequences: list[list[int]], answers: "list[Future[list[float]]]") -> None:
        engine, now = self._ready_engine(), time.monotonic_ns()
        keys = [f"probe/{now}/{row}" for row in range(len(sequences))]
        try:
            for key, tokens in zip(keys, sequences, strict=True):
                engine.submit(probe_request(key, tokens))
        except Exception:
            engine.abort(keys)
            raise
        self._probes |= dict(zip(keys, answers, strict=True))

    def _sample(
        self, prompts: pa.Table, samples: int, sampling: SamplingSettings, seed: int, other: Snapshot | None
    ) -> pa.Table:
        engine, requests = self._ready_engine(), sample_requests(prompts, samples, sampling, seed)
        try:
            if other is not None:
                engine.load(other, "sample")
            started = time.perf_counter()
            completions = engine.run(requests)
            self._busy_s += time.perf_counter() - started
        finally:
            if other is not None and self._current is not None:
                self._put_back(*self._current)
        self._response_tokens += sum(len(completion.tokens) for completion in completions)
        return samples_table(prompts, samples, completions, self._tokenizer)

    def _put_back(self, snapshot: Snapshot, label: str) -> None:
        """The published weights, where others were. As with those that are published: a load that fails leaves weights
        that nobody knows, perhaps by the old name, and nothing is leased any more."""
        was_half_loaded, self._half_loaded = self._half_loaded, True
        self._ready_engine().load(snapshot, label)
        self._half_loaded = was_half_loaded

    # work for the stream -----------------------------------------------------------------------------------------

    def _begin(self, work: Work) -> None:
        self._abandon_but(None)  # of work that never came to its end
        self._work, self._leasing = work, False
        self._delivery.work = work
        self.adjust(work.share, ScoringPools(work.scorers, work.references))

    def _end(self) -> None:
        self._work = self._delivery.work = None

    def _abandon_but(self, attempt: int | None) -> None:
        self._held = [each for each in self._held if each.chunk.attempt == attempt]
        keys = self._open.abandon_but(attempt)
        if keys:
            self._ready_engine().abort(keys)

    def _maybe_lease(self) -> None:
        """Ask the stream for as many chunks as there is room for; its answer arrives as a command."""
        if self._work is None or self._leasing or self._exclusive or not self._is_confirmed():
            return
        work = self._work
        chunks = chunks_to_lease(
            self._open.slots, self._pending(), work.chunk_size, self._share, self._settings.max_concurrent
        )
        if chunks == 0:
            return
        self._leasing = True
        future = work.stream.lease.remote(self._name, chunks, LEASE_WAIT_S).future()
        future.add_done_callback(
            lambda done: self._commands.put_nowait(("own", lambda: self._admit(done, work), Future()))
        )

    def _is_confirmed(self) -> bool:
        loaded = self._current[1] if self._current is not None else None
        return not self._half_loaded and loaded not in self._unconfirmed

    def _admit(self, leased: "Future[list[Chunk] | None]", work: Work) -> None:
        if work is not self._work:
            return  # of work that is over: its stream is gone or going, and what the call came to is nobody's concern
        chunks = leased.result()
        if chunks is None:
            return  # it is to leave: asking again would be answered so again, at once
        self._leasing = False
        if self._half_loaded:
            return  # it is given up, and these are leased to others
        for chunk in chunks:
            self._abandon_but(chunk.attempt)
            opened = self._open.add(chunk)
            for request in opened.requests(work.sampling) if opened is not None else ():
                self._ready_engine().submit(request)

    def _step(self) -> None:
        started = time.perf_counter()
        completions = self._ready_engine().step()
        self._busy_s += time.perf_counter() - started
        for completion in completions:
            if completion.key.partition("/")[0] != KIND:
                logprobs = completion.prompt_logprobs
                assert logprobs is not None
                self._probes.pop(completion.key).set_result(logprobs.tolist())
                continue
            self._response_tokens += len(completion.tokens)
            whole = self._open.complete(completion)
            if whole is not None:
                self._send(whole)

    def _send(self, opened: OpenChunk) -> None:
        """Hand a generated chunk to scorer, reference and stream by reference; the rows never come back here. One with
        tokens of weights that are not confirmed is held."""
        if not opened.versions.isdisjoint(self._unconfirmed):
            self._held.append(opened)
            return
        work = self._work
        assert work is not None
        episodes = ray.put(opened.episodes(work.run, work.round_number, self._name))
        slots = [slot.index for slot in opened.chunk.slots]
        self._delivery.send(Unscored(episodes, slots, work))


def snapshot_of_directory(directory: str) -> Snapshot:
    """The weights of a Hugging Face directory (safetensors) as a snapshot of version (0, 0)."""
    from safetensors.torch import load_file

    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise RunProblem(f"There are no safetensors weights in {directory}.", "model/weights")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return pack(state, (0, 0))
