"""A load of completion requests over plain HTTP/1.1, by as little of a client as there can be.

What a client costs is taken from the server's cores, so nothing is parsed but lengths: a response is its bytes, and the
moment at which they came.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Target:
    """Where requests go: host, port, and the body of each, by its number."""

    host: str
    port: int
    body: dict[str, object]

    def request(self, prompt: Sequence[int], seed: int) -> bytes:
        """One request's bytes."""
        body = json.dumps({**self.body, "prompt": list(prompt), "seed": seed}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Load:
    """What came of a load: when each request began and ended (seconds since the load began), and what was wrong."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """Of streams: when a chunk came (seconds since the load began), and for how long its client had waited since the
    one before."""
    firsts: list[tuple[float, float]] = field(default_factory=list)
    """Of streams: when the first chunk came, and for how long its client had waited since it asked."""
    seconds: float = 0.0

    def latencies(self) -> list[float]:
        """Seconds, sorted."""
        return sorted(end - begin for begin, end in zip(self.begun, self.ended, strict=True))

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the requests was answered."""
        found = self.latencies()
        return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")


async def run_load(target: Target, prompts: Sequence[Sequence[int]], clients: int, seconds: float) -> Load:
    """`clients` ask one after another for `seconds`; requests that are under way then are waited for and counted."""
    load = Load()
    start = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        turn = 0
        try:
            while time.perf_counter() - start < seconds:
                arrivals = [time.perf_counter()]
                begun = arrivals[0] - start
                writer.write(target.request(prompts[(number + turn * clients) % len(prompts)], number + turn * clients))
                failure, closes = await _answered(reader, arrivals)
                waits = [(later - start, later - earlier) for earlier, later in pairwise(arrivals)]
                load.firsts += waits[:1]
                load.gaps += waits[1:]
                if closes:
                    writer.close()
                    reader, writer = await asyncio.open_connection(target.host, target.port)
                if failure is not None:
                    load.failures.append(failure)
                    if len(load.failures) > 100:
                        return
                load.begun.append(begun)
                load.ended.append(time.perf_counter() - start)
                turn += 1
        finally:
            writer.close()

    async with asyncio.timeout(seconds + 300):
        await asyncio.gather(*(client(number) for number in range(clients)))
    load.seconds = max(load.ended, default=0.0)
    return load


async def _answered(reader: asyncio.StreamReader, arrivals: list[float]) -> tuple[str | None, bool]:
    """Read one response. What was wrong with it, None where it was whole; and whether the server closes the connection
    after it. The moments at which chunks of a stream came are added to `arrivals`."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = head.split(b" ", 2)[1]
    if b"transfer-encoding: chunked" in head:
        last = b""
        while True:
            size = int(await reader.readline(), 16)
            part = await reader.readexactly(size + 2)
            if not size:
                break
            arrivals.append(time.perf_counter())
            last = part
        whole = b"[DONE]" in last
    else:
        length = int(head.partition(b"content-length:")[2].split(b"\r", 1)[0])
        last = await reader.readexactly(length)
        whole = True
    failure = None if status == b"200" and whole else f"{status.decode()}: {last[:200]!r}"
    return failure, b"connection: close" in head
