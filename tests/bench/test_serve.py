"""The load of the serving benchmark against a server that answers by rote, and its figures from made-up loads."""

import asyncio
import os

import pytest

from bench.http_load import Load, Target, run_load
from bench.serve import SWAP_S, cpu_seconds, summary, swap_figures, table

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"


def load_of(response: bytes, clients: int = 2, seconds: float = 0.2, pause_s: float = 0.0) -> tuple[Load, list[bytes]]:
    """What came of clients of a server whose every answer is `response`, with a pause before its last chunk; and the
    requests that it read."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = int(head.partition(b"Content-Length: ")[2].split(b"\r")[0])
            asked.append(await reader.readexactly(length))
            await asyncio.sleep(0.001)
            first, mark, rest = response.rpartition(b"e\r\ndata:") if pause_s else (response, b"", b"")
            writer.write(first)
            if pause_s:
                await asyncio.sleep(pause_s)
            writer.write(mark + rest)

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


def test_how_long_the_client_of_a_stream_waited_for_each_chunk_is_told():
    load, _ = load_of(STREAM, clients=1, pause_s=0.03)
    assert len(load.gaps) == len(load.firsts) == len(load.ended)  # two chunks each
    assert all(wait < 0.03 for _, wait in load.firsts)
    assert all(wait >= 0.03 for _, wait in load.gaps)
    assert all(wait <= at <= load.seconds for at, wait in (*load.firsts, *load.gaps))
    whole, _ = load_of(WHOLE)
    assert whole.gaps == whole.firsts == []


@pytest.mark.parametrize(("response", "says"), [(CUT, "200"), (BUSY, "503")])
def test_answers_that_are_cut_or_refused_are_failures(response, says):
    load, _ = load_of(response)
    assert load.failures
    assert load.failures[0].startswith(says)


def test_the_figures_are_ratios_of_tokens_a_second():
    def load(requests: int) -> Load:
        return Load([0.0] * requests, [0.5] * requests, seconds=10.0)

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


def test_what_a_change_of_weights_costs_is_told_of_each_and_beside_windows_without():
    begun = [SWAP_S * number for number in range(4)]
    gaps = [(0.5, 0.02), (1.5, 0.03), (SWAP_S + 0.1, 0.04), (2 * SWAP_S + 0.1, 0.02), (2 * SWAP_S + 0.2, 0.09)]
    gaps += [(3 * SWAP_S + 0.5, 0.3), (4 * SWAP_S + 0.1, 9.0)]  # the last after all
    firsts = [(0.3, 0.1), (3 * SWAP_S + 0.1, 0.2)]
    load = Load([0.0, 1.0], [1.0, 3.0], ["503: lost"], gaps, firsts, 10.0)
    figures = swap_figures(load, begun, [(0, 0.0), (0, 0.0), (0, 0.0), (1, 0.05), (3, 0.25)])
    assert figures["stood_still_ms"] == {"mean": pytest.approx(250 / 3), "longest": pytest.approx(200)}
    assert (figures["swaps"], figures["lost"], figures["requests"]) == (3, 1, 2)
    assert figures["median_wait_ms"] == {"first_chunk": pytest.approx(150), "next_chunk": pytest.approx(40)}
    assert figures["longest_wait_in_a_window_ms"] == {
        "first_chunk": {"without_change": pytest.approx([0, 100]), "with_change": pytest.approx([0, 200])},
        "next_chunk": {"without_change": pytest.approx([30, 40]), "with_change": pytest.approx([90, 300])},
    }


def test_the_cpu_time_of_a_process_is_found_by_its_part():
    before = cpu_seconds(os.getpid())
    sum(number for number in range(3_000_000))
    after = cpu_seconds(os.getpid())
    assert 0.01 < sum(after.values()) - sum(before.values()) < 60
