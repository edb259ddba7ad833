"""A client that leaves: the call on the worker is cancelled at once and its slot comes back."""

import asyncio

import httpx
import pytest

from rigs.fake_worker import Script, StartWorker, endless, queued, silent
from rigs.gateways import DEADLINE_S, ServeGateway, chat, until


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [endless, silent, queued])
async def test_leaving_client_cancels_the_call(
    start_worker: StartWorker, serve_gateway: ServeGateway, stream: bool, script: Script
) -> None:
    worker = await start_worker(script=script)
    gateway = await serve_gateway(worker, max_concurrent_requests=1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=DEADLINE_S) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat(stream=stream)))
        await until(lambda: len(worker.requests) == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: worker.cancelled == 1)
        async with asyncio.timeout(DEADLINE_S):  # the only slot is free again
            while True:
                reply = await client.post("/v1/chat/completions", json=chat(max_tokens=0))
                if reply.status_code == 400:
                    break


async def test_leaving_in_the_middle_of_a_stream_cancels_the_call(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker(script=endless)
    gateway = await serve_gateway(worker)
    async with (
        httpx.AsyncClient(base_url=gateway.url) as client,
        client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply,
    ):
        async for line in reply.aiter_lines():
            if '"content":"x"' in line:
                break
        assert worker.cancelled == 0
    await until(lambda: worker.cancelled == 1)


async def test_leaving_during_the_upload_frees_the_slot(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker()
    gateway = await serve_gateway(worker, max_concurrent_requests=1)
    host, port = gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    await writer.drain()
    async with httpx.AsyncClient(base_url=gateway.url) as client, asyncio.timeout(DEADLINE_S):
        while True:
            if (await client.post("/v1/completions", json={})).status_code == 429:
                break
        writer.close()
        await writer.wait_closed()
        while True:
            if (await client.post("/v1/completions", json={})).status_code == 400:
                break
    assert worker.requests == []
