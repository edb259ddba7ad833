"""Gateways over fake workers: an app without a port, or the whole process on a free one."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forepage.gateway.admission import Admission
from forepage.gateway.api_keys import ApiKey
from forepage.gateway.worker_directory import WorkerDirectory
from forepage.telemetry import Telemetry
from rigs.fake_worker import MODEL

DEADLINE_S = 10.0
JSON = {"content-type": "application/json"}
SECRET = "s3cret-prompt"
"""What a client said, and no error may repeat."""

OpenGateway = Callable[..., Awaitable["OpenedGateway"]]
ServeGateway = Callable[..., Awaitable["ServedGateway"]]


async def until(holds: Callable[[], bool]) -> None:
    """Poll until it holds; fails at the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


def data_points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    """Data points of an instrument."""
    data = reader.get_metrics_data()
    return [
        point
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


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
        return data_points(self.metric_reader, name)


@dataclass
class ServedGateway:
    """`run` on a port."""

    url: str
    stop: asyncio.Event
    task: "asyncio.Task[None]"


def key_file(folder: Path, *kept: ApiKey) -> Path:
    """A file of these keys."""
    path = folder / "keys"
    path.write_text("".join(f"{key.model_dump_json()}\n\n" for key in kept))
    return path


def bearer(key: str) -> dict[str, str]:
    """The header that shows it."""
    return {"authorization": f"Bearer {key}"}


async def check_error(reply: httpx.Response) -> None:
    """What every error of ours looks like, on whatever path: a hook of the client that tests ask with.

    A probe's 503 and what a browser asks before it asks are no errors for people to read.
    """
    is_read = reply.request.url.path != "/health/ready" and reply.request.method != "OPTIONS"
    if reply.status_code < 400 or not is_read:
        return
    await reply.aread()
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["message"]
    assert error["request_id"] == reply.headers["x-request-id"]


def error_of(reply: httpx.Response) -> dict[str, str | None]:
    """The error of an answer that is nothing else, and does not repeat SECRET."""
    body = reply.json()  # its shape is looked at by `check_error`
    assert list(body) == ["error"]
    assert SECRET not in reply.text
    error: dict[str, str | None] = body["error"]
    return error


def chat(content: str = "Hi", **fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def events_of(reply: httpx.Response) -> list[Any]:
    """Decoded `data:` lines of a stream; anything else but blank lines and comments fails."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]
