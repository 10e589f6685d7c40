"""The load of the serving benchmark against a server that answers by rote, and its figures from made-up loads."""

import asyncio
import os

import pytest

from bench.http_load import Load, Target, run_load
from bench.serve import cpu_seconds, summary, table

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"


def load_of(response: bytes, clients: int = 2, seconds: float = 0.2) -> tuple[Load, list[bytes]]:
    """What came of clients of a server whose every answer is `response`; and the requests that it read."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = int(head.partition(b"Content-Length: ")[2].split(b"\r")[0])
            asked.append(await reader.readexactly(length))
            await asyncio.sleep(0.001)
            writer.write(response)

    async def scene() -> Load:
        def quiet(*_: object) -> None:
            """Connections that end in the midst of nothing are how clients leave."""

        asyncio.get_running_loop().set_exception_handler(quiet)
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await run_load(Target("127.0.0.1", port, {"model": "policy"}), [[1, 2], [3]], clients, seconds)
        server.close()
        return found

    return asyncio.run(scene()), asked


@pytest.mark.parametrize("response", [WHOLE, STREAM])
def test_whole_answers_are_counted(response):
    load, asked = load_of(response)
    assert load.failures == []
    assert len(load.ended) == len(asked) > 2
    assert b'"prompt": [1, 2], "seed": 0' in asked[0] or b'"prompt": [3], "seed": 1' in asked[0]
    assert 0.001 <= load.quantile(0.5) <= load.quantile(0.99) <= load.seconds


@pytest.mark.parametrize(("response", "says"), [(CUT, "200"), (BUSY, "503")])
def test_answers_that_are_cut_or_refused_are_failures(response, says):
    load, _ = load_of(response)
    assert load.failures
    assert load.failures[0].startswith(says)


def test_the_figures_are_ratios_of_tokens_a_second():
    def load(requests: int) -> Load:
        return Load([0.0] * requests, [0.5] * requests, [], 10.0)

    loads = {
        ("vllm", 8, False): [load(100)],
        ("amenable", 8, False): [load(80), load(100)],
        ("vllm", 8, True): [load(100)],
        ("amenable", 8, True): [load(50)],
    }
    spent = {("vllm", 8, False): {"worker": 0.064, "rest": 0.0}}
    answer = summary(loads, [8], {"lost": 0}, spent)
    plain, streamed = answer["loads"]
    assert plain["vllm"]["tokens_per_s"] == 640
    assert plain["ratio"] == pytest.approx(0.9)
    assert streamed["ratio"] == pytest.approx(0.5)
    assert answer["streaming_us_per_token"]["vllm"]["8"] == pytest.approx(0)
    assert answer["streaming_us_per_token"]["amenable"]["8"] == pytest.approx(1e6 / 320 - 1e6 / 576)
    assert plain["vllm"]["cpu_us_per_token"] == {"rest": 0.0, "worker": pytest.approx(10)}
    assert "0.90" in table(answer)


def test_the_cpu_time_of_a_process_is_found_by_its_part():
    before = cpu_seconds(os.getpid())
    sum(number for number in range(3_000_000))
    after = cpu_seconds(os.getpid())
    assert 0.01 < sum(after.values()) - sum(before.values()) < 60
