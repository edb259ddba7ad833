"""Fixtures of the gateway's tests: fake workers, and gateways over them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forepage.gateway.admission import Admission
from forepage.gateway.app import create_app, run
from forepage.gateway.worker_directory import FixedWorkers, WorkerDirectory
from forepage.settings import SEEDED_MODEL, GatewaySettings, Settings
from forepage.telemetry import open_telemetry
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from rigs.fake_worker import FakeWorker, StartWorker
from rigs.gateways import DEADLINE_S, OpenedGateway, OpenGateway, ServedGateway, ServeGateway, check_error


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Start a FakeWorker with these fields."""
    async with AsyncExitStack() as stack:

        async def start(**fields: Any) -> FakeWorker:
            worker = FakeWorker(**fields)
            await worker.start()
            stack.push_async_callback(worker.stop)
            return worker

        yield start


@pytest.fixture
async def open_gateway() -> AsyncIterator[OpenGateway]:
    """Open an app over workers; settings by name, `folder` for another tokenizer."""
    async with AsyncExitStack() as stack:

        async def open_it(*workers: FakeWorker, folder: Path = SEEDED_MODEL, **fields: Any) -> OpenedGateway:
            settings = GatewaySettings(worker_addresses=tuple(w.address for w in workers), **fields)
            exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
            telemetry = open_telemetry(
                "gateway",
                instance_id="test",
                span_processors=[SimpleSpanProcessor(exporter)],
                metric_readers=[reader],
            )
            stack.callback(telemetry.close)
            directory = WorkerDirectory(FixedWorkers(settings.worker_addresses), telemetry)
            stack.push_async_callback(directory.close)
            await directory.refresh()
            admission = Admission(settings.max_concurrent_requests)
            app = create_app(
                settings,
                tokenizer=Tokenizer.load(folder),
                wording=Wording.load(folder),
                directory=directory,
                admission=admission,
                telemetry=telemetry,
            )
            client = httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://gateway",
                event_hooks={"response": [check_error]},
            )
            await stack.enter_async_context(client)
            return OpenedGateway(app, client, directory, admission, telemetry, exporter, reader)

        yield open_it


@pytest.fixture
async def serve_gateway() -> AsyncIterator[ServeGateway]:
    """Run the gateway process over workers, on a free port, and stop it at the end."""
    served: list[ServedGateway] = []

    async def serve(*workers: FakeWorker, **fields: Any) -> ServedGateway:
        settings = Settings(
            gateway=GatewaySettings(
                port=0, worker_addresses=tuple(w.address for w in workers), worker_poll_s=0.05, **fields
            )
        )
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = asyncio.create_task(run(settings, stop, listening=port.set_result))
        served.append(ServedGateway(f"http://127.0.0.1:{await port}", stop, task))
        async with httpx.AsyncClient(base_url=served[-1].url) as client, asyncio.timeout(DEADLINE_S):
            while True:
                if (await client.get("/health/ready")).status_code == 200:
                    return served[-1]
                await asyncio.sleep(0.01)

    yield serve
    for gateway in served:
        gateway.stop.set()
        await gateway.task
