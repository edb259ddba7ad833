"""Connections of clients that nobody knows yet: a head that never comes, or never ends, is not waited for."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from forepage.gateway import connection
from forepage.gateway.dashboard import FEED_PATH
from rigs.fake_worker import StartWorker
from rigs.gateways import DEADLINE_S, ServedGateway, ServeGateway, chat

LATE_S = 0.3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", LATE_S)


@asynccontextmanager
async def connected(
    gateway: ServedGateway,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that says what the test writes; everything has to happen within the deadline."""
    address = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield reader, writer
    finally:
        writer.close()


def post(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n"


async def reply_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One answer of a connection that may go on."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_ends_the_connection(
    start_worker: StartWorker, serve_gateway: ServeGateway, said: bytes
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with connected(gateway) as (reader, writer):
        writer.write(said)
        assert await reader.read() == b""


async def test_a_head_that_comes_byte_by_byte_is_not_waited_for(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with connected(gateway) as (reader, writer):
        gone = asyncio.create_task(reader.read())
        writer.write(b"GET /health/live HTTP/1.1\r\nx: ")
        while not gone.done():
            writer.write(b"x")
            await asyncio.sleep(LATE_S / 10)
        assert gone.result() == b""


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\nx: y\r\nx"])
async def test_a_head_without_end_is_refused(
    start_worker: StartWorker, serve_gateway: ServeGateway, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", DEADLINE_S)
    gateway = await serve_gateway(await start_worker())
    async with connected(gateway) as (reader, writer):
        writer.write(start + b"x" * connection.MAX_HEAD_BYTES)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


async def test_a_second_request_has_its_own_time_and_bodies_and_answers_have_theirs(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    body = json.dumps(chat()).encode()
    async with connected(gateway) as (reader, writer):
        for _ in range(2):
            writer.write(post(body))
            await asyncio.sleep(2 * LATE_S)
            writer.write(body)
            status, _ = await reply_of(reader)
            assert status == 200
            await asyncio.sleep(2 * LATE_S)  # idle, for less than uvicorn keeps it
        writer.write(b"GET / HT")
        assert await reader.read() == b""


async def test_a_stream_is_not_cut_by_the_time_for_heads(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with connected(gateway) as (reader, writer):
        writer.write(f"GET {FEED_PATH} HTTP/1.1\r\nhost: x\r\n\r\nGET / HT".encode())  # and a half one behind
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(3 * LATE_S)
        assert not reader.at_eof()
