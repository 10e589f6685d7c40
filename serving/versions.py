"""Which weights wrote which tokens of a response: noted as an engine finishes them, and told with the response.

The version at admission is the header x-amenable-version. The body's last word, the end of the JSON or the last chunk
of a stream, carries `"amenable": {"versions": [{"index", "version", "start", "end"}]}`: tokens [start, end) of choice
`index`. Nothing is parsed on the way: what is added is put before the closing brace.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

VERSION_HEADER = b"x-amenable-version"
DONE = b"data: [DONE]"
FAILED = b'data: {"error"'
"""How vLLM's application begins an event of a stream that cannot go on; the text of a model is never at this place."""


@dataclass
class Spans:
    """Spans of one request so far; `n` choices of each prompt."""

    n: int = 1
    found: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    """Generated tokens of finished choices."""

    def note(self, prompt: int, completion: Any) -> None:
        """A choice of prompt number `prompt` has finished: vLLM's `CompletionOutput` with its versions."""
        index = prompt * self.n + completion.index
        for span in completion.weight_versions or ():
            self.found.append({"index": index, "version": span.version, "start": span.start, "end": span.end})
            self.tokens += span.end - span.start

    def json(self) -> bytes:
        """What is put before a closing brace."""
        versions = sorted(self.found, key=lambda span: (span["index"], span["start"]))
        return b',"amenable":' + json.dumps({"versions": versions}, separators=(",", ":")).encode()


CURRENT: ContextVar[Spans | None] = ContextVar("spans", default=None)
"""Of the request that the present task works for."""


class Annotating:
    """An ASGI `send` that tells the versions with a response of an engine's application."""

    def __init__(
        self,
        send: Send,
        spans: Spans,
        version: str,
        headers: list[tuple[bytes, bytes]],
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """`version` is the engine's at admission; `headers` are added to the response's own. Where the engine `is_lost`
        what the application says of that is not sent."""
        self._send, self._spans, self._is_lost = send, spans, is_lost
        self._headers = [*headers, (VERSION_HEADER, version.encode())]
        self._start: Message = {}
        self._streams = False
        self._annotates = True
        self._body = bytearray()
        self._held: bytes | None = None
        self.started = False
        """Whether anything has gone to the client."""
        self.status = 0
        """The response's status, once it is known."""
        self.lost = False
        """Whether the engine has died and the response was not sent, or not to its end, because of that."""
        self._closed = False

    def close(self) -> None:
        """Send nothing any more: the client has left."""
        self._closed = True

    async def __call__(self, message: Message) -> None:
        if self._closed:
            return
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message["headers"] if name.lower() in _KEPT]
            self.status = message["status"]
            if self.status >= 500 and self._is_lost():
                self._lose()
                return
            self._streams = any(name == b"content-type" and b"event-stream" in value for name, value in kept)
            self._annotates = self.status == 200
            self._start = {**message, "headers": [*kept, *self._headers]}
            if self._streams:
                await self._begin()
        elif self._streams:
            await self._chunk(message)
        else:
            await self._part(message)

    def _lose(self) -> None:
        self.lost = True
        self.close()

    async def _begin(self) -> None:
        self.started = True
        await self._send(self._start)

    async def _part(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        if self._annotates and self._spans.found and self._body.endswith(b"}"):
            self._body[-1:] = self._spans.json() + b"}"
        self._start["headers"].append((b"content-length", str(len(self._body)).encode()))
        await self._begin()
        await self._send({"type": "http.response.body", "body": bytes(self._body)})

    async def _chunk(self, message: Message) -> None:
        """Events go on at once until a choice has finished: from there on each waits for the next, since the last one
        before [DONE] tells the versions."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if body.startswith(FAILED) and self._is_lost():
            self._lose()
            return
        if body.startswith(DONE):
            if self._held is not None:
                event = self._held.rstrip(b"\n")
                if event.endswith(b"}"):
                    event = event[:-1] + self._spans.json() + b"}"
                body, self._held = event + b"\n\n" + body, None
        elif body and self._spans.found:
            body, self._held = self._held or b"", body
        if not more and self._held is not None:
            body, self._held = self._held + body, None
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


_KEPT = frozenset({b"content-type", b"cache-control", b"retry-after"})
"""Headers of an engine's application that go on."""


def tracked(generate: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `AsyncLLM.generate`, which notes the spans of what it finishes with the request that it works for."""
    from contextlib import aclosing

    async def generate_and_note(prompt: Any, params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        spans = CURRENT.get()
        # vLLM's completions end the id of a request with the number of the prompt; a chat has one prompt.
        last = request_id.rpartition("-")[2]
        number = int(last) if request_id.startswith("cmpl-") and last.isdigit() else 0
        async with aclosing(generate(prompt, params, request_id, *args, **kwargs)) as outputs:
            async for output in outputs:
                if spans is not None:
                    for completion in output.outputs:
                        if completion.weight_versions:
                            spans.note(number, completion)
                yield output

    return generate_and_note
