"""The engine slots of a replica: which model is in which, what is put in next, and following the run.

Slots follow: newer weights of a model that is in one, and what people have pinned `policy` to, are put in as they come.
A model that no slot holds takes the place of the one that was used least recently, when it is asked for.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from actors.episodes import parse_version
from corpus.problems import RunProblem
from serving.desired import Place, Wish, read_wish
from serving.errors import ApiError, engine_lost
from serving.feeds import TAKES, Feed
from serving.names import POLICY, Names, Weights

DWELL_S = 5.0
"""Seconds for which a model that was just put in stays, until somebody has used it: those who wait for it try again
within a second or two, and must not find it gone. House default."""

RETRY_S = 1.0
"""Seconds after which a client should ask again for a model that is loading."""

log = logging.getLogger(__name__)


class Slot(Protocol):
    """What is needed of an `EngineSlot` here."""

    number: int
    holds: str | None
    version: str
    loading: str | None
    in_flight: int
    used_at: float
    served_since_load: int
    loaded_at: float
    broken: str | None

    async def take(self, name: str, weights: Weights, *, newer: bool = False) -> None:
        """Put weights in; with `newer` only where the slot still holds the model."""
        ...


class Slots:
    """The slots of one replica. Its methods run on one event loop."""

    def __init__(
        self,
        run: Place,
        slots: list[Any],
        names: Names,
        feed: Feed,
        follow_s: float,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`look` brings the run's news to this machine before each look at its files, and waits for them; it raises
        RunProblem where it cannot, and then what is here is served on."""
        self.slots: list[Slot] = slots
        self._run, self._names, self._feed, self._follow_s, self._look = run, names, feed, follow_s, look
        self._taking: dict[str, tuple[Slot, asyncio.Task[None]]] = {}
        self.wish = Wish()
        """What is wanted, as it was last read."""
        self.problem: str | None = None
        """Why the replica does not serve what is wanted; None where it does."""
        self._unseen: str | None = None
        """Why the last look brought no news; None where it did."""

    async def meaning(self, name: str) -> Weights | None:
        """What `name` means now; None where there is no such model. `policy` is what people have pinned, or newest."""
        if name == POLICY and self.wish.pinned is None:
            return await self._feed.newest()
        return await asyncio.to_thread(self._names.find, self.wish.pinned or name if name == POLICY else name)

    async def latest(self, name: str) -> Weights | None:
        """The same, after a look at the run's news. What cannot be looked at is told of, and what is here counts."""
        await self._look_at_news()
        return await self.meaning(name)

    async def read_wish(self) -> None:
        """Look at what is wanted. A file that cannot be read changes nothing, and is told of."""
        try:
            self.wish = await asyncio.to_thread(read_wish, self._run)
            self.problem = None
        except RunProblem as problem:
            self.problem = str(problem)

    async def holding(self, name: str) -> Any:
        """The slot that holds `name`. Raises ApiError: 404 where there is no such model, 503 `model_loading` where it
        is only being put in now, 503 `engine_lost` where no engine is left."""
        for slot in self.slots:
            if slot.holds == name and slot.broken is None:
                return slot
        if all(slot.broken is not None for slot in self.slots):
            raise engine_lost()
        if name not in self._taking and not any(slot.loading == name for slot in self.slots):
            if await self.meaning(name) is None:
                raise ApiError(
                    404, "model_not_found", f"There is no model {name[:80]!r}; /v1/models lists them.", "model"
                )
            if name not in self._taking:  # somebody else may have begun meanwhile
                place = self._place()
                if place is not None:
                    self._taking[name] = (place, asyncio.create_task(self._put(place, name)))
        raise ApiError(
            503, "model_loading", f"{name} is being loaded; ask again in a second.", "model", retry_after_s=RETRY_S
        )

    async def follow(self) -> None:
        """Put newer weights in as they come, for ever. A slot that waits for its requests keeps no other one back."""
        under_way: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                await self._told(self._look_around())
                for slot in self.slots:
                    renewal = under_way.get(slot.number)
                    if renewal is None or renewal.done():
                        under_way[slot.number] = asyncio.create_task(self._told(self._renew(slot)))
                await asyncio.sleep(self._follow_s)
        finally:
            for renewal in under_way.values():
                renewal.cancel()

    async def _told(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, whose problem is told of: it is tried again, and what is served goes on being served."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - see above
            if str(error) != self.problem:
                log.warning("weights are not followed: %s", error)
            self.problem = str(error)

    async def catch_up(self) -> None:
        """Look as `follow` does, until a look has come to its end. Raises what the last of TAKES looks raised: what was
        published may be removed before it is read."""
        for left in reversed(range(TAKES)):
            try:
                return await self.follow_once()
            except RunProblem:
                if not left:
                    raise

    async def follow_once(self) -> None:
        """One look at what is wanted and at every model that a slot holds. Raises what putting weights in raises."""
        await self._look_around()
        for slot in self.slots:
            await self._renew(slot)

    async def _look_around(self) -> None:
        await self.read_wish()
        await self._look_at_news()

    async def _renew(self, slot: Slot) -> None:
        """Put newer weights of what `slot` holds into it, where there are some."""
        name = slot.holds
        if name is None or slot.broken is not None:
            return
        weights = await self.meaning(name)
        if weights is None:
            if name == POLICY and self.wish.pinned is not None:
                self.problem = f"{self.wish.pinned} is wanted as policy, and its weights are not there (any more)."
            return
        back = _is_older(weights.version, slot.version) and not self._is_pinned(name)
        if weights.version != slot.version and not back and slot.holds == name:
            await slot.take(name, weights, newer=True)

    def state(self) -> dict[str, Any]:
        """What this replica serves, as it reports it."""
        return {
            "slots": [{"model": s.holds, "version": s.version, "loading": s.loading} for s in self.slots],
            "wish": self.wish.counter,
            "problem": self.problem,
        }

    async def _look_at_news(self) -> None:
        try:
            await asyncio.to_thread(self._look)
            self._unseen = None
        except RunProblem as problem:
            self.problem = str(problem)
            if self.problem != self._unseen:
                log.warning("news of the run are not seen: %s", problem)
            self._unseen = self.problem

    def _is_pinned(self, name: str) -> bool:
        return name == POLICY and self.wish.pinned is not None

    def _place(self) -> Slot | None:
        """The slot whose model goes: the least recently used, one without requests if there is one. None where all are
        being changed, or were changed a moment ago for somebody who has not come yet."""
        now = time.monotonic()
        taken = [slot for slot, _ in self._taking.values()]
        free = [
            slot
            for slot in self.slots
            if slot.loading is None
            and slot.broken is None
            and slot not in taken
            and (slot.holds is None or slot.served_since_load or now - slot.loaded_at > DWELL_S)
        ]
        return min(free, key=lambda slot: (slot.holds is not None, slot.in_flight > 0, slot.used_at), default=None)

    async def _put(self, slot: Slot, name: str) -> None:
        try:
            weights = await self.meaning(name)
            if weights is not None:
                await slot.take(name, weights)
        except Exception as error:  # noqa: BLE001 - told of; whoever asks again begins again
            log.warning("%s was not loaded: %s", name, error)
            self.problem = str(error)
        finally:
            del self._taking[name]


def _is_older(version: str, than: str) -> bool:
    """Whether both are versions of published weights, and the first is the older one."""
    try:
        return parse_version(version) < parse_version(than)
    except ValueError:
        return False
