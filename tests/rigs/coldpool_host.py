"""A cold pool manager and its holders in one process, over a Unix socket; a host has a folder of its own."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forepage.coldpool.client import ColdPoolClient, PublishedRecord, RecordKind, SlotRef
from forepage.coldpool.records import payload_checksum
from forepage.coldpool.server import read_geometry, serve
from forepage.settings import ColdpoolSettings, ModelSettings, Settings
from forepage.telemetry import Telemetry, open_telemetry

SLOT_BYTES = read_geometry(ModelSettings()).slot_bytes
NUM_SLOTS = 6


@dataclass
class Host:
    """One machine: a folder for shared memory, and telemetry to look at."""

    folder: Path
    spans: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    metrics: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self) -> None:
        self.telemetry: Telemetry = open_telemetry(
            "test",
            instance_id="test",
            span_processors=[SimpleSpanProcessor(self.spans)],
            metric_readers=[self.metrics],
        )

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/s"

    @asynccontextmanager
    async def manager(self, **coldpool: Any) -> AsyncIterator[None]:
        coldpool = {"capacity_bytes": NUM_SLOTS * SLOT_BYTES, "probe_interval_s": 0.02, **coldpool}
        section = ColdpoolSettings(listen=self.address, shm_dir=self.folder, **coldpool)
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(Settings(instance="t", coldpool=section), stop, self.telemetry))
        try:
            yield
        finally:
            stop.set()
            await serving

    @asynccontextmanager
    async def holder(self, name: str = "w0") -> AsyncIterator[ColdPoolClient]:
        client = ColdPoolClient(
            self.address,
            holder_id=name,
            slot_bytes=SLOT_BYTES,
            model_fingerprint="m",
            telemetry=self.telemetry,
        )
        try:
            await client.attach()
            yield client
        finally:
            await client.close()

    def counted(self, metric: str) -> dict[str, float]:
        """A metric's points by their first attribute."""
        data = self.metrics.get_metrics_data()
        assert data is not None
        return {
            str(next(iter((point.attributes or {"": ""}).values()))): getattr(point, "value", 0)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for its in scope.metrics
            if its.name == metric
            for point in its.data.data_points
        }


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def write(client: ColdPoolClient, ref: SlotRef, name: str) -> PublishedRecord:
    payload = name.encode() * 7
    client.view.payload(ref.arena_id)[: len(payload)] = payload
    kind = RecordKind.RESUME if name.startswith("r") else RecordKind.BLOCK
    return PublishedRecord(ref, key_of(name), kind, 0, 1, len(payload), payload_checksum(payload))


async def store(client: ColdPoolClient, *names: str) -> list[SlotRef]:
    refs = await client.reserve(len(names))
    return await client.publish([write(client, ref, name) for ref, name in zip(refs, names, strict=True)])
