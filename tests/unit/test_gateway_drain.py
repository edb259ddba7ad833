"""Stopping: not ready at once, nothing new, running answers get their time, then a typed end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from forepage.errors import DependencyError, ModelFormatError
from forepage.gateway.app import run
from forepage.rpc import worker_pb2 as pb
from forepage.settings import GatewaySettings, ModelSettings, Settings
from forepage.settings_environment import SettingsError
from rigs.fake_worker import StartWorker, endless, finished, started, tokens
from rigs.gateways import DEADLINE_S, ServeGateway, chat, until


async def refused(client: httpx.AsyncClient) -> httpx.Response:
    """The first answer that says the gateway drains."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            reply = await client.get("/health/ready")
            if reply.status_code == 503:
                return reply


async def test_drain_lets_the_running_answer_end(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    go_on = asyncio.Event()

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        await go_on.wait()
        yield tokens(b"late")
        yield finished(request, 4)

    worker = await start_worker(script=script)
    gateway = await serve_gateway(worker)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=DEADLINE_S) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
        await until(lambda: len(worker.requests) == 1)
        gateway.stop.set()
        assert (await refused(client)).json() == {"status": "draining"}
        assert (await client.get("/health/live")).status_code == 200
        new = await client.post("/v1/chat/completions", json=chat())
        assert (new.status_code, new.json()["error"]["code"]) == (503, "dependency_unavailable")
        assert new.headers["retry-after"]
        assert not gateway.task.done()
        go_on.set()
        assert (await asking).json()["choices"][0]["message"]["content"] == "late"
        async with asyncio.timeout(DEADLINE_S):
            await gateway.task
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            await client.get("/health/live")


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_that_outlast_the_drain_end_with_a_typed_error(
    start_worker: StartWorker, serve_gateway: ServeGateway, stream: bool
) -> None:
    worker = await start_worker(script=endless)
    gateway = await serve_gateway(worker, drain_timeout_s=0.1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=DEADLINE_S) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat(stream=stream)))
        await until(lambda: len(worker.requests) == 1)
        gateway.stop.set()
        reply = await asking
    last = [line for line in reply.text.split("\n") if line][-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "dependency_unavailable"
    assert reply.status_code == (200 if stream else 503)
    await until(lambda: worker.cancelled == 1)
    async with asyncio.timeout(DEADLINE_S):
        await gateway.task


async def test_taken_port_is_a_typed_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = GatewaySettings(port=taken.getsockname()[1], worker_addresses=("127.0.0.1:1",))
        with pytest.raises(DependencyError, match="cannot listen"):
            await run(Settings(gateway=gateway), asyncio.Event())


async def test_missing_tokenizer_and_missing_workers_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="WORKER_ADDRESSES"):
        await run(Settings(gateway=GatewaySettings(port=0)), asyncio.Event())
    model = ModelSettings(path=tmp_path)
    gateway = GatewaySettings(port=0, worker_addresses=("127.0.0.1:1",))
    with pytest.raises(ModelFormatError, match="tokenizer"):
        await run(Settings(model=model, gateway=gateway), asyncio.Event())
