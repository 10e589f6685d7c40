"""vLLM's engine in this process, driven step by step: requests in, completions out, weights changed between steps.

With tensor parallelism the scheduler is in this process still, and the model in one child process for each device.

Invariants:
- A request's tokens depend on the weights, its prompt and its own seed, not on what else is in the batch.
- A completion says which weights wrote which of its tokens.
- After weights change, nothing computed from the old ones is read by a request that begins: the prefix cache is emptied
  or, where running requests keep their keys and values, salted by load. Unless they keep them, running requests have
  theirs computed again.

Only this module imports vllm, and only when an engine is made: the import takes seconds.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.owner import OWNER_VARIABLE
from actors.settings import RolloutSettings
from actors.snapshot_files import in_shared_memory
from corpus.problems import RunProblem, UsageProblem
from corpus.telemetry import TELEMETRY_OFF
from models.snapshot import Snapshot, unpack, verify

ENVIRONMENT = {
    **TELEMETRY_OFF,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with its actor: no orphaned process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # roles share cores on small machines
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Without CUDA graphs only a few small sampler functions would be compiled: seconds of start-up for nothing.
    "TORCH_COMPILE_DISABLE": "1",
}
"""Set before vllm is imported, unless the person has set them."""

RANK_EXTENSION = "actors.engine_rank.Extension"
"""What vLLM imports in the processes of a model that is divided over several devices."""

PREFILL_TOKENS = 4096
"""Prompt tokens that one engine step reads at most (never less than one whole sequence)."""


@dataclass(frozen=True)
class Request:
    """One response to be drawn. `seed` makes it repeatable; top-k is never used.

    With `score_prompt` the completion also carries the log-probabilities of the prompt's own tokens.
    """

    key: str
    prompt_tokens: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    score_prompt: bool = False


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, end) were written by the weights called `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """A finished response. `logprobs` are of its tokens under the weights that wrote them, at the temperature used.

    `finish_reason` is "stop" where the end-of-text token was produced (it is then the last token), else "length".
    `prompt_logprobs` [prompt − 1], in nats, are of every prompt token after the first, where they were asked for.
    """

    key: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    spans: list[VersionSpan]
    prompt_logprobs: np.ndarray | None = None


class RolloutEngine:
    """A vLLM engine for one causal language model directory; other weights of the same shape can be loaded into it."""

    def __init__(self, model_directory: str, settings: RolloutSettings, max_sequence_tokens: int) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ranks = settings.tensor_parallel
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
        if ranks > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, settings.threads // ranks))  # of each; they inherit it
            os.environ[OWNER_VARIABLE] = str(os.getpid())
        # vLLM writes what it has learnt of a model's class under HOME; nothing of ours depends on it.
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from actors.snapshot_transfer import register

        try:
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model_directory,
                    dtype=settings.dtype,
                    max_model_len=max_sequence_tokens,
                    max_num_seqs=settings.max_concurrent,
                    enforce_eager=True,
                    kv_cache_memory_bytes=(settings.kv_cache_mib << 20) // ranks,  # vLLM's is of one device
                    gpu_memory_utilization=free_share(settings.gpus / ranks),
                    tensor_parallel_size=ranks,
                    # One device: in this very process. More: a process for each, below this one; vLLM's Ray executor
                    # would make actors of its own, which nobody of ours gives up or places.
                    distributed_executor_backend="uni" if ranks == 1 else "mp",
                    worker_extension_cls="" if ranks == 1 else RANK_EXTENSION,
                    generation_config="vllm",  # not the model's own sampling defaults
                    logprobs_mode="processed_logprobs",  # after temperature: what the token was really drawn from
                    # A prompt is read in one step: vLLM takes back the draw of an unfinished prompt, which a CPU
                    # generator with a seed cannot do.
                    enable_chunked_prefill=False,
                    max_num_batched_tokens=max(PREFILL_TOKENS, max_sequence_tokens),
                    async_scheduling=False,  # else a batch in flight is labelled with the next weights' version
                    enable_prefix_caching=True,
                    disable_log_stats=True,
                    trust_remote_code=False,
                    weight_transfer_config=WeightTransferConfig(backend=register(chosen_transport(settings))),
                )
            )
        except (ValueError, OSError) as error:
            raise UsageProblem(
                f"vLLM cannot serve the model in {model_directory}: {_first_line(error)}", "model/vllm"
            ) from error
        self._ranks = ranks
        self._model_directory = model_directory
        self._max_sequence_tokens = max_sequence_tokens
        self._loaded_names: frozenset[str] | None = None
        self._transport = chosen_transport(settings)
        self._keeps_kv = settings.kv_on_publish == "keep"
        self._loads = 0
        self.stepped_at = time.monotonic()
        """When the last step came to its end, by the monotonic clock."""

    @property
    def pending(self) -> int:
        """Requests that are waiting or running."""
        return self._engine.get_num_unfinished_requests()

    @property
    def cached_tokens(self) -> int:
        """Tokens of running requests whose keys and values are in memory: what a load computes again, unless it keeps
        them."""
        return sum(request.num_computed_tokens for request in self._scheduler.running)

    def submit(self, request: Request) -> None:
        """Queue one request. Raises UsageProblem where prompt and response cannot fit the context."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if len(request.prompt_tokens) + request.max_tokens > self._max_sequence_tokens:
            raise UsageProblem(
                f"A prompt of {len(request.prompt_tokens)} tokens and a response of up to {request.max_tokens} do not "
                f"fit the context of {self._max_sequence_tokens} tokens.",
                "data/too-long",
            )
        prompt: TokensPrompt = {"prompt_token_ids": list(request.prompt_tokens)}
        if self._keeps_kv:
            prompt["cache_salt"] = self._salt()
        self._engine.add_request(
            request.key,
            prompt,
            SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                logprobs=0,
                prompt_logprobs=0 if request.score_prompt else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )

    def step(self) -> list[Completion]:
        """One engine step: up to one token for every running request. Returns the requests that finished in it."""
        outputs = self._engine.step()
        self.stepped_at = time.monotonic()
        return [self._completion(output) for output in outputs if output.finished]

    def abort(self, keys: Iterable[str]) -> None:
        """Drop these requests, where they are still waiting or running; they will not be completed."""
        self._engine.abort_request(list(keys))

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All of `requests`, in their order, with nothing else in the engine meanwhile. None stays behind where it
        raises."""
        if self.pending:
            raise RunProblem(
                f"The engine still has {self.pending} requests; they must finish before a batch is run.", "fleet/order"
            )
        done: dict[str, Completion] = {}
        try:
            for request in requests:
                self.submit(request)
            while self.pending:
                done.update({completion.key: completion for completion in self.step()})
        except Exception:
            self.abort(request.key for request in requests)
            raise
        return [done[request.key] for request in requests]

    def connect(self, init_info: dict[str, Any]) -> None:
        """Let the learner's side of a GPU transport reach this engine. Raises RunProblem where it cannot."""
        try:
            self._engine.collective_rpc("init_weight_transfer_engine", args=(init_info,))
        except (RuntimeError, ValueError) as error:
            raise RunProblem(
                f"An engine could not be connected to the learner's {self._transport} weight transport: {error}",
                "publication/transport",
            ) from error

    def load(self, snapshot: Snapshot, version: str, offer: dict[str, Any] | None = None) -> float:
        """Put `snapshot`'s weights in place of the present ones and call them `version`; running requests go on, with
        keys and values as the settings say. With an `offer` of the learner's GPU transport they come through it.

        Returns the seconds for which generation stood still. Raises RunProblem where the snapshot is damaged or
        lacks weights that an earlier one had, or the offer is not of its weights or cannot be taken; in that last case
        the engine is not to be used any more.
        """
        started = time.perf_counter()
        verify(snapshot)
        names = frozenset(entry.name for entry in snapshot.manifest)
        if self._loaded_names is not None and names != self._loaded_names:
            odd = sorted(names ^ self._loaded_names)[0]
            raise RunProblem(
                f"Weights {version} do not name the same tensors as those before them: {odd} differs.",
                "publication/mapping",
            )
        if offer is not None:
            _check_offer(offer, snapshot, version)
        self._engine.collective_rpc("start_weight_update")
        try:
            with self._update(snapshot, offer) as update:
                self._engine.collective_rpc("update_weights", args=(update,))
        except (RuntimeError, ValueError, OSError) as error:
            if offer is None and self._ranks == 1:
                raise
            raise RunProblem(
                f"Weights {version} could not be received over {self._transport}: {error}", "publication/transport"
            ) from error
        self._engine.collective_rpc("finish_weight_update")
        self._loads += 1
        if self._keeps_kv:
            self._salt_waiting()
        elif not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RunProblem(
                f"vLLM kept keys and values of older weights when {version} was loaded.", "publication/mapping"
            )
        self._engine.set_weight_version(version)
        self._loaded_names = names
        return time.perf_counter() - started

    def when_a_part_is_lost(self, call: Callable[[], None]) -> None:
        """Have `call` made, on a thread of vLLM's, when a process that holds a part of the model dies. Without parts in
        processes of their own it is never made."""
        core: Any = self._engine.engine_core  # vLLM's, in this process
        core.engine_core.model_executor.register_failure_callback(call)

    def close(self) -> None:
        """Free the engine's memory; it is not to be used afterwards."""
        self._engine.engine_core.shutdown()

    @contextmanager
    def _update(self, snapshot: Snapshot, offer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """What the engine's workers are told: the learner's offer, or where in this machine's memory weights are."""
        if offer is not None:
            yield offer
        elif self._ranks == 1:
            yield {"weights": list(unpack(snapshot))}
        else:
            with in_shared_memory(snapshot) as path:
                yield {"snapshot": str(path)}

    @property
    def _scheduler(self) -> Any:
        """vLLM's own, which is in this process."""
        core: Any = self._engine.engine_core
        return core.engine_core.scheduler

    def _salt(self) -> str:
        """What the keys of the prefix cache begin with. It counts loads: other weights may go by a version's name."""
        return f"load {self._loads}"

    def _salt_waiting(self) -> None:
        """Let requests that wait look for keys and values of the present weights: they hold none, having not begun or
        having lost theirs to want of memory, and would find those of the weights under which they were submitted."""
        for request in self._scheduler.waiting:
            request.cache_salt = self._salt()
            request.block_hashes.clear()
            request.update_block_hashes()

    def _completion(self, output: Any) -> Completion:
        best = output.outputs[0]
        tokens = list(best.token_ids)
        logprobs = [at[token].logprob for at, token in zip(best.logprobs, tokens, strict=True)]
        spans = [VersionSpan(span.version, span.start, span.end) for span in best.weight_versions or ()]
        prompt = None
        if output.prompt_logprobs is not None:
            pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            prompt = np.array([at[token].logprob for at, token in pairs], dtype=np.float32)
        return Completion(output.request_id, tokens, logprobs, str(best.finish_reason), spans, prompt)


def probe_request(key: str, tokens: Sequence[int]) -> Request:
    """A request whose completion carries the log-probabilities of `tokens`, at temperature 1."""
    return Request(key, tokens, max_tokens=1, temperature=1.0, seed=0, score_prompt=True)


def free_share(gpus: float) -> float:
    """The share of a GPU's memory that must be free when an engine starts there, where its process has `gpus` of one.

    vLLM by itself would have 0.92 of any GPU free, whatever the engine is to take: on a GPU that is shared it would not
    start beside a learner, or beside other engines. Of a whole one 0.9 must be.
    """
    return 0.9 * min(gpus, 1.0) if gpus else 0.9


def chosen_transport(settings: RolloutSettings) -> str:
    """The transport that `auto` stands for, or the one that is named."""
    return "object_store" if settings.transport == "auto" else settings.transport


def _check_offer(offer: dict[str, Any], snapshot: Snapshot, version: str) -> None:
    """Raises RunProblem where the learner's GPU offers other tensors than the snapshot holds."""
    offered = zip(offer["names"], offer["shapes"], offer["dtype_names"], strict=True)
    held = [(entry.name, entry.shape, entry.dtype) for entry in snapshot.manifest]
    for place, (name, shape, dtype) in enumerate(offered):
        if place >= len(held) or (name, tuple(shape), dtype) != held[place]:
            raise RunProblem(
                f"Weights {version}: what the learner's GPU offers, {name} of shape {list(shape)} in {dtype}, is not "
                f"what its snapshot holds there.",
                "publication/mapping",
            )
    if len(offer["names"]) != len(held):
        raise RunProblem(
            f"Weights {version}: the learner's GPU offers {len(offer['names'])} tensors, and its snapshot holds "
            f"{len(held)}.",
            "publication/mapping",
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
