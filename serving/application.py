"""The Ray Serve application: replicas of gateway and engine slots, and the reward model beside them.

`serving.application:build` is what a Serve config file imports; its arguments are those of `Arguments`. A replica is
whole: it has its own engines and way in, and follows the run by its files, so replicas need not know of one another.
Of a run that an object store keeps these are a mirror's, which the replicas of a machine share.
"""

import asyncio
import gc
import logging
import os
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from actors.exported_metrics import run_tag
from actors.published import PINNED_NAME
from actors.settings import SamplingSettings, ScoringSettings
from actors.telemetry import Telemetry
from corpus import logs
from corpus.problems import RunProblem, UsageProblem
from corpus.tokenising import TokenLimits
from serving.access import Access
from serving.desired import Place, WishOvertaken, read_reports, remove_report, write_report, write_wish
from serving.engine import EngineSlot
from serving.feeds import NewestOf, PublishedFeed, StoreFeed
from serving.front import check_guarded
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.names import POLICY, TITLES, Names, Weights
from serving.page.api import page_router
from serving.page.backend import ServedLimits, ServedModel, ServedState, Session, Visitor, Wish, WishConflict
from serving.page.run_view import PageRun
from serving.requests import Bounds
from serving.scores import Scores, has_reward_model, positions_of, scorer_of
from serving.served_run import ServedRun, place_of
from serving.settings import ServingSettings
from serving.slots import Slots

APPLICATION = "amenable"
DEPLOYMENT = "policy"

HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 20.0
DRAIN_S = 60.0
"""Seconds for the requests of a replica that is to end. House default."""

REPORT_S = 5.0
"""Seconds after which a replica says again what it serves. House default."""

CONSTRUCTIONS = 3
"""Times that a replica which does not start is tried before the deployment has failed. House default."""

log = logging.getLogger(__name__)


class Arguments(BaseModel):
    """What the application is told, by the command or a Serve config file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(
        description="The run's directory, as replicas see it, or its address in an object store; keys come from the "
        "environment of the replicas."
    )
    token_file: str | None = Field(
        default=None,
        description="File of hashed tokens, as replicas see it. None: AMENABLE_TOKENS, and without that the service "
        "answers its own machine alone.",
    )
    page: bool = Field(default=True, description="Whether the spot-check page is served.")
    settings: ServingSettings | None = Field(default=None, description="Instead of the recipe's `serving`.")


class Channel(BaseModel):
    """`user_config`: what can change without a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str | None = Field(default=None, description="The run that is meant; another than the replica's is refused.")
    channel: str = Field(default=POLICY, description="The model that a request means which names none.")


class Replica:
    """One replica: engines, slots, gateway and page of one run."""

    async def __init__(self, arguments: dict[str, Any], scores: Any = None) -> None:
        """Engines hold the newest weights and have generated a token when this returns. Raises RunProblem or
        UsageProblem where they cannot."""
        told = Arguments.model_validate(arguments)
        self._run = ServedRun.of(told.run)
        self._id = f"{os.uname().nodename}-{os.getpid()}"
        await asyncio.to_thread(self._run.look)
        self._names = self._run.names
        logs.begin("serving", self._id, self._run.name)
        recipe = await asyncio.to_thread(self._names.recipe)
        self._settings = told.settings or ServingSettings.model_validate(recipe.get("serving", {}))
        self._bounds = bounds_of(self._settings, recipe, self._names.skeleton())
        self._metrics = Metrics(Telemetry(run_tag(told.run), "serving", self._id))
        self._store_feed = StoreFeed(self._names)
        feed = NewestOf([self._store_feed, PublishedFeed(self._names)])
        engines = [EngineSlot(n, self._settings, self._bounds.context_tokens) for n in range(self._settings.engines)]
        follow_s = self._settings.follow_s
        look = partial(self._run.look, follow_s)
        self._slots = Slots(self._run.place, list(engines), self._names, feed, follow_s, look)
        self._engines = engines
        token_file = Path(told.token_file) if told.token_file is not None else None
        self._access = await asyncio.to_thread(Access, self._run.root, token_file, self._run.sessions)
        if self._access.open:
            check_guarded()
        await self._start_engines()
        await self._slots.catch_up()  # with what was published while the engines started
        page = await self._page() if told.page else None
        self._gateway = Gateway(
            access=self._access,
            bounds=self._bounds,
            models=self._slots,
            listed=self._listed,
            scorer=scorer_of(scores) if scores is not None else None,
            metrics=self._metrics,
            healthy=self._healthy,
            page=page,
            log_prompts=self._settings.log_prompts,
        )
        self._tasks = [asyncio.create_task(self._slots.follow()), asyncio.create_task(self._report())]
        gc.collect()
        gc.freeze()  # what was made so far stays: later collections need not look at it

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve hands requests to."""
        return self._gateway

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Follow another channel. Raises UsageProblem for another run, which needs another application."""
        wanted = Channel.model_validate(user_config)
        if wanted.run is not None and place_of(wanted.run) != self._run.place:
            raise UsageProblem(
                f"These replicas serve {self._run.name}; deploy another application for {wanted.run}.",
                "serving/channel",
            )
        if wanted.channel not in TITLES and not PINNED_NAME.fullmatch(wanted.channel):
            raise UsageProblem(
                f"{wanted.channel!r} is no model of a run; a channel is {', '.join(TITLES)} or policy@N.",
                "serving/channel",
            )
        self._gateway.channel = wanted.channel

    async def check_health(self) -> None:
        """Raises RunProblem where an engine is dead, broken, or silent for longer than `serving.stall_s`."""
        self._healthy()

    async def __del__(self) -> None:
        for task in self.__dict__.get("_tasks", []):
            task.cancel()
        for engine in self.__dict__.get("_engines", []):
            engine.close()
        if "_store_feed" in self.__dict__:
            self._store_feed.close()
            try:
                remove_report(self._run.place, self._id)
            except OSError as error:  # it goes stale by itself
                log.warning("the replica could not take back what it said it serves: %s", error)

    async def _start_engines(self) -> None:
        skeleton = await asyncio.to_thread(self._names.whole_skeleton)
        await self._slots.read_wish()
        given: list[tuple[str, Weights]] = []
        for name in self._settings.loaded:
            weights = await self._slots.meaning(name)
            if weights is not None and len(given) < len(self._engines):
                given.append((name, weights))
        if not given:
            raise RunProblem(
                f"{self._run.name} has none of the models {', '.join(self._settings.loaded)} yet (serving.loaded).",
                "serving/no-model",
            )
        for engine in self._engines[len(given) :]:  # those without a model of their own wait with another's weights
            await engine.start(*given[0], skeleton, partial(self._slots.latest, given[0][0]))
            engine.holds = None
        for engine, (name, weights) in zip(self._engines, given, strict=False):
            await engine.start(name, weights, skeleton, partial(self._slots.latest, name))

    def _healthy(self) -> None:
        for engine in self._engines:
            engine.check(self._settings.stall_s)

    async def _report(self) -> None:
        """Say what is served when that changes, and every few seconds, so that it is seen to be said still."""
        said: Any = None
        said_at = 0.0
        problem = ""
        while True:
            self._metrics.slots(self._engines)
            state, now = self._slots.state(), time.monotonic()
            if state != said or now - said_at > REPORT_S:
                try:
                    await asyncio.to_thread(write_report, self._run.place, self._id, state)
                    said, said_at, problem = state, now, ""
                except (OSError, RunProblem, UsageProblem) as error:
                    if str(error) != problem:
                        log.warning("the replica could not say what it serves: %s", error)
                    problem = str(error)
            await asyncio.sleep(self._settings.follow_s)

    async def _listed(self) -> list[dict[str, Any]]:
        state = await self._state()
        return [
            {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": "amenable",
                "max_model_len": self._bounds.context_tokens,
                "amenable": {"title": model.title, "version": model.version, "loaded": model.loaded},
            }
            for model in state.models
        ]

    async def _state(self) -> ServedState:
        found = await asyncio.to_thread(self._names.all)
        newest = await self._slots.meaning(POLICY)
        if newest is not None:
            found = {POLICY: newest, **{name: each for name, each in found.items() if name != POLICY}}
        loaded = {slot.holds: slot.version for slot in self._slots.slots if slot.holds is not None}
        wish = self._slots.wish
        return ServedState(
            models=[
                ServedModel(
                    name=name,
                    title=TITLES.get(name, f"the policy of version {weights.version}"),
                    version=loaded.get(name, weights.version),
                    loaded=name in loaded,
                )
                for name, weights in found.items()
            ],
            wish=Wish(counter=wish.counter, pinned=wish.pinned, who=wish.who, when=wish.when),
            limits=ServedLimits(max_tokens=self._bounds.max_tokens, prompt_tokens=self._bounds.prompt_tokens),
        )

    async def _page(self) -> FastAPI:
        """The page, whose files of the run are read by now: no visitor waits for that."""
        run = PageRun(self._run.root, self._run.title, self._run.keep)
        try:
            await asyncio.to_thread(run.warm)
        except (RunProblem, UsageProblem) as problem:  # the API is served all the same, and the page tells of it
            log.warning("the page will lack something: %s", problem)
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.include_router(page_router(run, _Backend(self)))
        return app

    @property
    def access(self) -> Access:
        """Who may use the service."""
        return self._access

    async def state(self) -> ServedState:
        """What is served now."""
        return await self._state()

    async def want(self, pinned: str | None, seen: int, who: str) -> Wish:
        """Writes the wish that follows the one numbered `seen`."""
        return await want(self._run.place, self._names, pinned, seen, who)


class _Backend:
    """The service as the page sees it."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def visitor(self, request: Request) -> Visitor | None:
        """See `PageBackend`."""
        return self._replica.access.visitor({name.lower(): value for name, value in request.headers.items()})

    async def log_in(self, token: str) -> Session | None:
        """See `PageBackend`."""
        return self._replica.access.log_in(token)

    async def log_out(self, cookie: str) -> None:
        """See `PageBackend`."""
        await asyncio.to_thread(self._replica.access.log_out, cookie)

    async def state(self) -> ServedState:
        """See `PageBackend`."""
        return await self._replica.state()

    async def want(self, pinned: str | None, seen: int, who: str) -> Wish:
        """See `PageBackend`."""
        return await self._replica.want(pinned, seen, who)


async def want(run: Place, names: Names, pinned: str | None, seen: int, who: str) -> Wish:
    """Writes what the replicas of `run` should serve as `policy`, and returns it. Raises WishConflict where somebody
    else has changed it since the wish numbered `seen`, UsageProblem where there is no such version."""
    if pinned is not None and await asyncio.to_thread(names.find, pinned) is None:
        versions = [name for name in await asyncio.to_thread(names.all) if name not in TITLES]
        raise UsageProblem(
            f"There is no version {pinned}; there are {', '.join(versions) or 'none'}.", "serving/version"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        written = await asyncio.to_thread(write_wish, run, pinned, seen, who, now, token_name=who)
    except WishOvertaken as overtaken:
        raise WishConflict(str(overtaken)) from None
    return Wish(counter=written.counter, pinned=written.pinned, who=written.who, when=written.when)


def bounds_of(settings: ServingSettings, recipe: dict[str, Any], skeleton: Path) -> Bounds:
    """The limits as they are for the run with this recipe and a model like the one in `skeleton`."""
    import json

    limits = settings.limits
    tokens = TokenLimits.model_validate(recipe.get("tokens", {}))
    sampling = SamplingSettings.model_validate(recipe.get("sampling", {}))
    most = limits.max_tokens or min(sampling.max_response_tokens, tokens.context_tokens - 1)
    config = json.loads((skeleton / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    context = min(tokens.context_tokens, positions_of(skeleton, tokens.context_tokens))
    prompt = min(limits.prompt_tokens or context - 1, context - 1)
    return Bounds(limits, context, prompt, min(most, context - 1), int(config["vocab_size"]))


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for a Serve config file or the command. Raises UsageProblem where the run cannot be served."""
    told = Arguments.model_validate(arguments)
    run = ServedRun.of(told.run)
    run.look()
    names = run.names
    recipe = names.recipe()
    settings = told.settings or ServingSettings.model_validate(recipe.get("serving", {}))
    names.skeleton()
    replicas: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        replicas = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.limits.concurrent // 2,
            }
        }
    policy = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options=_room(settings.threads * settings.engines, settings.gpus),
        max_ongoing_requests=2 * settings.limits.concurrent + 64,  # the gateway refuses sooner, and says why
        max_queued_requests=4 * settings.limits.concurrent,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        max_constructor_retry_count=CONSTRUCTIONS,
        user_config={"run": told.run, "channel": POLICY},
        **replicas,
    )(serve.ingress()(Replica))
    if not settings.score or not has_reward_model(names.reward_model()):
        return policy.bind(told.model_dump(mode="json"))
    scoring = ScoringSettings.model_validate(recipe.get("scoring", {}))
    scores = serve.deployment(
        name="scores",
        ray_actor_options=_room(1, scoring.gpus),
        max_ongoing_requests=settings.limits.concurrent,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )(Scores)
    device = "cuda" if scoring.gpus else "cpu"
    context = TokenLimits.model_validate(recipe.get("tokens", {})).context_tokens
    bound = scores.bind(told.run, scoring.rows_per_batch, device, scoring.dtype, context)
    return policy.bind(told.model_dump(mode="json"), bound)


def replicas_say(run: Place) -> dict[str, dict[str, Any]]:
    """What the replicas of the run that have spoken lately serve, by their ids."""
    return read_reports(run)


def _room(cpus: float, gpus: float) -> dict[str, Any]:
    return {"num_cpus": cpus, **({"num_gpus": gpus} if gpus else {})}
