"""A decode worker that answers from a script, and gateways over it: in-process, or served on a port."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forepage.gateway.admission import Admission
from forepage.gateway.app import create_app, run
from forepage.gateway.worker_directory import FixedWorkers, WorkerDirectory
from forepage.rpc import worker_pb2 as pb
from forepage.rpc.worker_pb2_grpc import DecodeWorkerServicer, add_DecodeWorkerServicer_to_server
from forepage.settings import BUNDLED_MODEL, GatewaySettings, Settings
from forepage.telemetry import Telemetry, open_telemetry
from forepage.text.tokenizer import Tokenizer

MODEL = "forepage-test"
ANSWER = "The answer is 42 🙂."
DEADLINE_S = 10.0

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateEvent]]
StartWorker = Callable[..., Awaitable["FakeWorker"]]
OpenGateway = Callable[..., Awaitable["OpenedGateway"]]
ServeGateway = Callable[..., Awaitable["ServedGateway"]]


async def until(holds: Callable[[], bool]) -> None:
    """Poll until it holds; fails at the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


def started(request: pb.GenerateRequest, cached: int = 0) -> pb.GenerateEvent:
    """The first event of an answer."""
    return pb.GenerateEvent(
        started=pb.Started(prompt_tokens=len(request.prompt_token_ids), cached_tokens=cached)
    )


def tokens(ids: bytes | list[int]) -> pb.GenerateEvent:
    """Tokens; bytes are their own ids."""
    return pb.GenerateEvent(tokens=pb.Tokens(token_ids=list(ids)))


def finished(
    request: pb.GenerateRequest, completion_tokens: int, *, reason: str = "STOP", cached: int = 0
) -> pb.GenerateEvent:
    """The last event, with a report."""
    return pb.GenerateEvent(
        finished=pb.Finished(
            reason=f"FINISH_REASON_{reason}",
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=cached,
            completion_tokens=completion_tokens,
            residency=pb.ResidencyReport(
                mode_requested="RESIDENCY_MODE_GUARDED",
                mode_final="RESIDENCY_MODE_EXACT",
                audited_steps=3,
                evidence_recall_mean=0.95,
            ),
        )
    )


async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """ANSWER, two bytes an event, cut to max_tokens."""
    data = ANSWER.encode()
    shown = data[: request.sampling.max_tokens]
    yield started(request, cached=2)
    for start in range(0, len(shown), 2):
        yield tokens(shown[start : start + 2])
    yield finished(request, len(shown), reason="STOP" if shown == data else "LENGTH", cached=2)


async def endless(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """Tokens for ever."""
    yield started(request)
    while True:
        yield tokens(b"x")
        await asyncio.sleep(0.002)


async def silent(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """Starts, then says nothing."""
    yield started(request)
    await asyncio.Event().wait()


@dataclass
class FakeWorker(DecodeWorkerServicer):
    """Answers by `script`; remembers what it was asked and how many calls were cancelled."""

    worker_id: str = "worker-0"
    model_name: str = MODEL
    max_context_tokens: int = 1000
    running: int = 0
    waiting: int = 0
    max_running: int = 4
    draining: bool = False
    script: Script = answer
    address: str = ""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0

    def __post_init__(self) -> None:
        self._server = grpc.aio.server()
        add_DecodeWorkerServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated

    async def start(self, port: int = 0) -> None:
        """Listen."""
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """Gone at once."""
        await self._server.stop(None)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:  # noqa: ARG002, N802
        """Load."""
        return pb.DescribeReply(
            worker_id=self.worker_id,
            model_name=self.model_name,
            model_fingerprint="fp-1",
            max_context_tokens=self.max_context_tokens,
            running=self.running,
            waiting=self.waiting,
            max_running=self.max_running,
            draining=self.draining,
        )

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:  # noqa: N802
        """By the script."""
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            async for event in self.script(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


@dataclass
class OpenedGateway:
    """An app without a port, and its parts."""

    app: FastAPI
    client: httpx.AsyncClient
    directory: WorkerDirectory
    admission: Admission
    telemetry: Telemetry
    span_exporter: InMemorySpanExporter
    metric_reader: InMemoryMetricReader

    def spans(self) -> dict[str, ReadableSpan]:
        """Ended spans by name."""
        return {span.name: span for span in self.span_exporter.get_finished_spans()}

    def metric(self, name: str) -> list[Any]:
        """Data points of an instrument."""
        data = self.metric_reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@dataclass
class ServedGateway:
    """`run` on a port."""

    url: str
    stop: asyncio.Event
    task: "asyncio.Task[None]"


def chat(content: str = "Hi", **fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


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
    """Open an app over workers; settings by name."""
    async with AsyncExitStack() as stack:

        async def open_it(*workers: FakeWorker, **fields: Any) -> OpenedGateway:
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
                tokenizer=Tokenizer.load(BUNDLED_MODEL),
                directory=directory,
                admission=admission,
                telemetry=telemetry,
            )
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
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
