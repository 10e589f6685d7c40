"""How a worker is made: said once by the driver, which makes the first ones, and done again by the conductor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Placement(Protocol):
    """Room for a worker on the cluster."""

    def reserve(self, name: str) -> Any:
        """Asks for room for the worker `name`; returns what stands for it, at once."""
        ...

    def wait(self, reserved: Any, timeout_s: float) -> bool:
        """Whether there is room within `timeout_s`; blocks meanwhile."""
        ...

    def options(self, reserved: Any) -> dict[str, Any]:
        """Ray's options that put an actor there."""
        ...

    def release(self, reserved: Any) -> None:
        """Gives the room back."""
        ...

    def says(self) -> str:
        """What is asked for, for a person: "1 CPU and 0.5 GPU"."""
        ...


@dataclass(frozen=True)
class Call:
    """A method of a worker and what it is given."""

    method: str
    arguments: tuple[Any, ...] = ()

    def on(self, worker: Any) -> Any:
        """Begins the call."""
        return getattr(worker, self.method).remote(*self.arguments)


@dataclass(frozen=True)
class WorkerSpec:
    """A kind of worker: its Ray actor class, Ray's options, what its constructor is given after its name, and the calls
    after which it is ready. `placement` is None where Ray puts it wherever there is room."""

    actor: Any
    options: Mapping[str, Any]
    arguments: tuple[Any, ...]
    start: Sequence[Call] = field(default_factory=tuple)
    placement: Placement | None = None

    def make(self, name: str, reserved: Any = None) -> Any:
        """A new worker, in the room that was `reserved` for it; its constructor runs on."""
        where = self.placement.options(reserved) if self.placement is not None and reserved is not None else {}
        return self.actor.options(**self.options, **where).remote(name, *self.arguments)
