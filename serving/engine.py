"""An engine slot: one vLLM engine with vLLM's own OpenAI application, which takes the weights of any model of the run.

Invariants:
- A request is answered by the model that it named: other models are only put in once the slot's requests have ended.
- Newer weights of the policy go in between two engine steps, and requests go on; each response says which version wrote
  which tokens. Those that have begun keep their keys and values (or, by the settings, have them computed again); all
  others read none that older weights wrote.
- Any other name keeps its weights to the end of a request: policy@N is another version where a later attempt of the run
  has published its update N.
- A slot whose weights could not be changed half-way is broken, and its replica is replaced.

vLLM is imported when an engine is made: the import takes seconds.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import joblib

from actors.owner import OWNER_VARIABLE
from actors.rollout_engine import free_share
from corpus.problems import RunProblem
from corpus.telemetry import TELEMETRY_OFF
from serving.errors import engine_lost
from serving.feeds import TAKES
from serving.names import POLICY, Weights
from serving.settings import ServingSettings
from serving.versions import CURRENT, Annotating, Send, Spans, tracked

if TYPE_CHECKING:
    from fastapi import FastAPI

ENVIRONMENT = {
    **TELEMETRY_OFF,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines share cores with others on small machines
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # without CUDA graphs only a few small sampler functions would be compiled
}
"""Set before vllm is imported, unless the person has set them; the engine's processes inherit them."""

PREFILL_TOKENS = 4096
"""Prompt tokens that one engine step reads at most (never less than one whole sequence)."""

HEARTBEAT_S = 1.0
"""Seconds between two questions to an engine's loop, which it answers between two steps."""

LEAVE_S = 5.0
"""Seconds for a request whose client has left to be taken out of the engine."""

log = logging.getLogger(__name__)

Latest = Callable[[], Awaitable[Weights | None]]


async def _nothing_newer() -> None:
    """For weights that stay where they are."""


Shapes = dict[str, tuple[int, ...]]


class EngineSlot:
    """One engine. Its methods run on the event loop that it was started on."""

    def __init__(self, number: int, settings: ServingSettings, context_tokens: int) -> None:
        self.number = number
        self.holds: str | None = None
        """The name whose weights are in the engine; None while another model is being put in."""
        self.version = ""
        """The version of these weights."""
        self.loading: str | None = None
        """The name that is being put in, in place of another, or with other weights than before."""
        self.in_flight = 0
        """Requests under way."""
        self.used_at = 0.0
        """When the last request came, by the monotonic clock."""
        self.served_since_load = 0
        """Requests since the present model was put in."""
        self.loaded_at = 0.0
        """When that was, by the monotonic clock."""
        self.broken: str | None = None
        """Why the engine is not to be used any more."""
        self.beat_at = time.monotonic()
        """When the engine's loop last answered."""
        self.stood_still_s: list[float] = []
        """Seconds for which generation stood still, for each change of weights."""
        self._settings, self._context_tokens = settings, context_tokens
        self._shapes: Shapes = {}
        self._changing = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine: Any = None
        self._app: FastAPI | None = None
        self._heart: asyncio.Task[None] | None = None

    @property
    def app(self) -> "FastAPI":
        """vLLM's application."""
        assert self._app is not None, "the engine is not started"
        return self._app

    @property
    def queued(self) -> int:
        """Responses that wait for a place in the engine: those beyond `max_concurrent`."""
        if self._engine is None:
            return 0
        return max(0, self._engine.get_num_unfinished_requests() - self._settings.max_concurrent)

    async def start(self, name: str, weights: Weights, skeleton: Path, latest: Latest = _nothing_newer) -> None:
        """Make the engine, with these weights, and have it generate a token. `skeleton` has config and tokenizer.

        Snapshots come and go while the engine is made: `latest` tells what `name` means by then. Raises RunProblem
        where vLLM cannot serve the model, or where the weights cannot be read TAKES times.
        """
        directory = weights.directory or skeleton
        if weights.directory is not None:
            await asyncio.to_thread(weights.check)
        try:
            await self._make(directory)
        except (ValueError, OSError, RuntimeError) as error:
            said = " ".join(str(error).split())[:400]
            raise RunProblem(f"vLLM cannot serve the model in {directory}: {said}", "model/vllm") from error
        self._shapes = await asyncio.to_thread(_shapes_of, sorted(directory.glob("*.safetensors")))
        if weights.directory is None:
            for left in reversed(range(TAKES)):
                try:
                    await self.take(name, await latest() or weights)
                    break
                except RunProblem:
                    if not left:
                        raise
        else:
            await self._engine.update_weight_version(weights.version)
            self._now_holds(name, weights.version)
        await self.one_token()
        self._heart = asyncio.create_task(self._beat())

    async def take(self, name: str, weights: Weights, *, newer: bool = False) -> None:
        """Put `weights` in and call them `name`. Requests go on where that is the policy and was before; all others are
        waited for. With `newer` nothing is done where the slot holds another model by then.

        Raises RunProblem where the weights are damaged or do not fit, the former ones staying, or where the requests
        did not end in time; where the engine could not take them the slot is broken.
        """
        await asyncio.to_thread(weights.check)
        shapes = await asyncio.to_thread(_shapes_of, weights.files())
        odd = _difference(shapes, self._shapes)
        if odd is not None:
            raise RunProblem(
                f"The weights of {name} ({weights.version}) do not fit this service's engines: {odd}.",
                "serving/weights",
            )
        async with self._changing:
            former = self.holds
            if newer and former != name:
                return
            goes_on = former == name == POLICY
            if former is not None and not goes_on:
                self.loading, self.holds = name, None
            try:
                async with asyncio.timeout(self._settings.load_deadline_s):
                    if not goes_on:
                        await self._idle.wait()
                    await self._swap(weights, keeps_kv=goes_on and self._settings.kv_on_publish == "keep")
            except TimeoutError:
                if self.broken is None and self.loading is not None:
                    self.holds = former
                raise RunProblem(
                    f"Engine {self.number} did not take the weights of {name} ({weights.version}) within "
                    f"{self._settings.load_deadline_s:g} s: its requests did not end, or vLLM does not answer.",
                    "serving/weights",
                ) from None
            finally:
                self.loading = None
            self._now_holds(name, weights.version)

    async def handle(self, scope: Any, body: bytes, send: Send, n: int, headers: list[tuple[bytes, bytes]]) -> int:
        """Answer one request by vLLM's application; `headers` are added to the answer. Returns how many tokens were
        generated. Raises ApiError (503) where the engine has died, before the answer or in the midst of a stream, and
        else what the application raises. A caller that is cancelled has its request aborted."""
        if self._is_lost():
            raise engine_lost()
        spans, gone = Spans(n), asyncio.Event()
        annotating = Annotating(send, spans, self.version, headers, self._is_lost)
        self.in_flight += 1
        self.served_since_load += 1
        self._idle.clear()
        self.used_at = time.monotonic()
        token = CURRENT.set(spans)
        answering = asyncio.create_task(self.app(scope, _once(body, gone), annotating))
        CURRENT.reset(token)
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            # vLLM's application ends a request whose client has left; being cancelled it would leave it running.
            annotating.close()
            gone.set()
            await asyncio.wait({answering}, timeout=LEAVE_S)
            answering.cancel()
            raise
        except Exception as error:
            if annotating.lost:
                raise engine_lost() from error
            raise
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
        if annotating.lost:
            raise engine_lost()
        return spans.tokens

    async def one_token(self) -> None:
        """Generate a token. Raises RunProblem where the engine cannot, or not in time."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompt: TokensPrompt = {"prompt_token_ids": [0]}
        try:
            async with asyncio.timeout(self._settings.start_deadline_s):
                async for _ in self._engine.generate(prompt, SamplingParams(max_tokens=1), f"ready-{time.time_ns()}"):
                    pass
        except TimeoutError:
            raise RunProblem(
                f"Engine {self.number} generated no token in {self._settings.start_deadline_s:g} s.", "serving/engine"
            ) from None

    def check(self, stall_s: float) -> None:
        """Raises RunProblem where the engine is dead, broken, or has given no sign of life for `stall_s`."""
        if self.broken is not None:
            raise RunProblem(f"Engine {self.number} is broken: {self.broken}", "serving/engine")
        if self._engine is None or self._engine.errored:
            raise RunProblem(f"Engine {self.number} has died.", "serving/engine")
        silent_s = time.monotonic() - self.beat_at
        if silent_s > stall_s:
            raise RunProblem(
                f"The loop of engine {self.number} has not answered for {silent_s:.0f} s.", "serving/engine"
            )

    def _is_lost(self) -> bool:
        """Whether requests come to nothing here: vLLM knows that its processes have died as soon as they have, before
        the heart stops."""
        return self.broken is not None or (self._engine is not None and self._engine.errored)

    def close(self) -> None:
        """End the engine's processes."""
        if self._heart is not None:
            self._heart.cancel()
        if self._engine is not None:
            self._engine.shutdown()

    async def _make(self, directory: Path) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["OMP_NUM_THREADS"] = str(self._settings.threads)
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.v1.engine.async_llm import AsyncLLM

        args = arguments(directory, self._settings, self._context_tokens)
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        self._engine = engine
        vars(engine)["generate"] = tracked(engine.generate)
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks)
        await init_app_state(engine, app.state, args, tasks)
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM's own is told so where its engine has died
        self._app = app

    async def _swap(self, weights: Weights, *, keeps_kv: bool) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        paths = [str(path) for path in weights.files()]
        update = {"safetensors": paths} if weights.snapshot is None else {"snapshot": paths[0]}
        try:
            # As AsyncLLM.pause_generation, without the time it sleeps so that outputs come before it returns.
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=not keeps_kv)
            started = time.perf_counter()  # the step that was under way has ended
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update))
            await self._engine.finish_weight_update(weight_version=weights.version)
            if keeps_kv:
                await self._engine.reset_prefix_cache()
            await self._engine.resume_generation()
        except BaseException as error:
            self.broken = f"it stopped in the midst of taking weights {weights.version} ({error!r})."
            raise
        self.stood_still_s.append(time.perf_counter() - started)

    def _now_holds(self, name: str, version: str) -> None:
        if self.holds != name:
            self.served_since_load, self.loaded_at = 0, time.monotonic()
            from vllm.entrypoints.openai.models.protocol import BaseModelPath

            models: Any = self.app.state.openai_serving_models
            models.base_model_paths[:] = [BaseModelPath(name=name, model_path=name)]
        self.holds, self.version = name, version

    async def _beat(self) -> None:
        """Ask the engine's loop for its version again and again: it answers between two steps, and a loop that hangs
        does not. No request is queued for it."""
        while not self._engine.errored:
            try:
                async with asyncio.timeout(self._settings.stall_s):
                    await self._engine.get_weight_version()
                    self.beat_at = time.monotonic()
            except Exception as error:  # noqa: BLE001 - a heart that stops is what `check` sees
                log.warning("engine %d did not answer: %r", self.number, error)
            await asyncio.sleep(HEARTBEAT_S)
        self.broken = "vLLM's processes have died."


def arguments(directory: Path, settings: ServingSettings, context_tokens: int) -> Any:
    """The arguments of `vllm serve` for one engine of the service."""
    from vllm.config import WeightTransferConfig
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from serving.worker import BACKEND

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(directory)])
    given = {
        "served_model_name": ["policy"],
        "dtype": settings.dtype,
        "max_model_len": context_tokens,
        "max_num_seqs": settings.max_concurrent,
        "enforce_eager": settings.gpus == 0,
        "kv_cache_memory_bytes": settings.kv_cache_mib << 20,
        "gpu_memory_utilization": free_share(settings.gpus / settings.engines),
        "generation_config": "vllm",  # not the model's own sampling defaults
        "max_logprobs": max(settings.limits.logprobs, 1),
        # A prompt is read in one step: vLLM takes back the draw of an unfinished prompt, which a CPU generator with a
        # seed cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(PREFILL_TOKENS, context_tokens),
        "scheduler_cls": "serving.scheduler.SaltingScheduler",
        "async_scheduling": False,  # else a batch in flight is labelled with the next weights' version
        "disable_log_stats": True,
        "enable_log_requests": False,
        "disable_fastapi_docs": True,
        "trust_remote_code": False,
        "allowed_origins": [],
        # Without a GPU vLLM by itself gives the worker a process of its own, for the sake of OpenMP, which the
        # environment sets here.
        "distributed_executor_backend": UniProcExecutor if is_one_process(settings) else None,
        "worker_extension_cls": "serving.worker.Extension",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    for name, value in given.items():
        if not hasattr(args, name):
            raise RunProblem(f"This version of vLLM has no argument {name}.", "serving/engine")
        setattr(args, name, value)
    return args


def is_one_process(settings: ServingSettings) -> bool:
    """Whether an engine is one process, and not two: its loop, and the worker that the loop waits for by spinning on a
    core. On GPUs vLLM chooses. Without, where nothing is said, they are two where loops and workers of all engines have
    cores, and what stands before them one more."""
    if settings.gpus > 0:
        return False
    if settings.worker_apart is not None:
        return not settings.worker_apart
    return joblib.cpu_count() <= settings.max_replicas * settings.engines * (settings.threads + 1)


def _once(body: bytes, gone: asyncio.Event) -> Any:
    """An ASGI `receive` with one whole body, after which the client is there until `gone`."""
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def _shapes_of(files: list[Path]) -> Shapes:
    """Names and shapes of the tensors in safetensors files, or in one weight snapshot."""
    from safetensors import safe_open

    from actors.snapshot_files import map_snapshot

    found: Shapes = {}
    for path in files:
        with safe_open(path, framework="numpy") as file:
            if list(file.keys()) == ["buffer"]:
                found.update({entry.name: tuple(entry.shape) for entry in map_snapshot(path).manifest})
            else:
                found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return found


def _difference(one: Shapes, other: Shapes) -> str | None:
    """What keeps weights of the shapes `one` from the place of `other`; a tied unembedding may be there or not."""
    for name in sorted({*one, *other} - {"lm_head.weight"}):
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name, 'missing')} where {other.get(name, 'nothing')} is expected"
    return None
