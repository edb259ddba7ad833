"""A lookahead index served in this process over a given arena, and a worker's end of its stream."""

import asyncio
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forepage.coldpool.records import SlotRef
from forepage.index.key_store import KeyStore, MappedKeys
from forepage.index.planner import Answer, Planner
from forepage.index.publisher import PlanPublisher
from forepage.index.question import QuestionLimits
from forepage.index.scorer import Scorer
from forepage.index.servicer import LookaheadServicer
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.memory_indexer import MemoryIndexer
from forepage.rpc import index_pb2 as pb
from forepage.rpc.edge import open_channel, serving
from forepage.rpc.index_pb2_grpc import LookaheadIndexStub, add_LookaheadIndexServicer_to_server
from forepage.settings import SEEDED_MODEL
from forepage.telemetry import MetricName, Telemetry, open_telemetry
from rigs.key_arena import CONFIG, SPEC

WAIT_S = 10.0
CPU = torch.device("cpu")
GEOMETRY = KvGeometry.from_config(CONFIG, KvFormat.FP8)


async def until(holds: Callable[[], bool]) -> None:
    """Poll until it holds; fails at the deadline."""
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 (a counter of other threads, nothing to wait on)
            await asyncio.sleep(0.005)


class HeldPlanner(Planner):
    """A planner whose answers to sequences named `held...` wait for `release`; counts what is under way."""

    def __init__(self, scorer: Scorer, limits: QuestionLimits) -> None:
        super().__init__(scorer, limits)
        self.release = threading.Event()
        self.fails = False
        self.num_started = self.num_ended = self.most_at_once = 0
        self._lock = threading.Lock()

    def answer(self, request: pb.LookaheadRequest, keys: MappedKeys, check: Callable[[], None]) -> Answer:
        with self._lock:
            self.num_started += 1
            self.most_at_once = max(self.most_at_once, self.num_started - self.num_ended)
        try:
            if request.stamp.sequence_id.startswith("held"):
                self.release.wait(WAIT_S)
            if self.fails:
                raise ValueError("a defect")
            return super().answer(request, keys, check)
        finally:
            with self._lock:
                self.num_ended += 1


@dataclass
class ServedIndex:
    """An index on a port and what can be seen of it."""

    address: str
    servicer: LookaheadServicer
    planner: HeldPlanner
    telemetry: Telemetry
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    def metric(self, name: MetricName) -> list[Any]:
        """Data points of an instrument."""
        return metric_points(self.reader, name)


def metric_points(reader: InMemoryMetricReader, name: MetricName) -> list[Any]:
    """Data points of an instrument so far."""
    data = reader.get_metrics_data()
    return [
        point
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


@asynccontextmanager
async def serving_index(
    arena: Path,
    *,
    max_inflight: int = 8,
    publisher: PlanPublisher | None = None,
    keys_device: torch.device = CPU,
) -> AsyncIterator[ServedIndex]:
    """The real servicer of the seeded model on a free port; the arena is mapped for `keys_device`."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    telemetry = open_telemetry(
        "index",
        instance_id="test",
        span_processors=[SimpleSpanProcessor(exporter)],
        metric_readers=[reader],
    )
    indexer = MemoryIndexer.load(SEEDED_MODEL, SPEC, GEOMETRY.format, CPU)
    limits = QuestionLimits.of_model(SPEC, GEOMETRY, num_target_layers=3, threshold=0.0)
    planner = HeldPlanner(Scorer(indexer, GEOMETRY, CPU), limits)
    store = KeyStore(arena, GEOMETRY, keys_device)
    servicer = LookaheadServicer(
        store,
        planner,
        publisher=publisher,
        telemetry=telemetry,
        max_inflight=max_inflight,
        clock=time.monotonic,
    )

    def register(server: grpc.aio.Server) -> None:
        add_LookaheadIndexServicer_to_server(servicer, server)

    try:
        async with serving("127.0.0.1:0", register, tls=None, drain_s=5) as (port, _):
            yield ServedIndex(f"127.0.0.1:{port}", servicer, planner, telemetry, exporter, reader)
            planner.release.set()
            servicer.drain()
    finally:
        planner.release.set()
        telemetry.close()
        assert await asyncio.to_thread(store.close, WAIT_S)


@dataclass
class Asker:
    """A worker's end of one stream; replies are kept by request id."""

    call: Any
    incoming: AsyncIterator[pb.LookaheadReply]
    replies: dict[int, pb.LookaheadReply] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    async def send(self, request: pb.LookaheadRequest) -> None:
        """Ask without waiting."""
        await self.call.write(request)

    async def reply(self, request_id: int) -> pb.LookaheadReply:
        """The reply of that id, whenever it comes."""
        async with asyncio.timeout(WAIT_S):
            while request_id not in self.replies:
                found = await anext(self.incoming)
                assert found.request_id not in self.replies, "answered twice"
                self.replies[found.request_id] = found
                self.order.append(found.request_id)
        return self.replies[request_id]

    async def ended(self) -> bool:
        """Wait for the end of the stream; whether it was a good one."""
        async with asyncio.timeout(WAIT_S):
            rest = [found async for found in self.incoming]
            return not rest and await self.call.code() is grpc.StatusCode.OK

    async def ask(self, request: pb.LookaheadRequest) -> pb.LookaheadReply:
        """Ask and wait."""
        await self.send(request)
        return await self.reply(request.request_id)


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[Asker]:
    """Open one stream."""
    async with open_channel(address, None) as channel:
        call = LookaheadIndexStub(channel).Lookahead()
        yield Asker(call, aiter(call))
        call.cancel()


def question(
    request_id: int,
    refs: Sequence[SlotRef],
    *,
    sequence: str = "s",
    audited: bool = False,
    seed: int = 0,
    **fields: Any,
) -> pb.LookaheadRequest:
    """Ask for the best two of all blocks; with an audit of c4 layer 1 in which every block is absent."""
    numbers = torch.Generator().manual_seed(seed)
    position = 256 * len(refs) + 100
    request = pb.LookaheadRequest(
        request_id=request_id,
        stamp=pb.Stamp(sequence_id=sequence, incarnation=1, interval=4),
        num_tokens=position + 1,
        arena_ids=struct.pack(f"<{len(refs)}I", *(ref.arena_id for ref in refs)),
        generations=struct.pack(f"<{len(refs)}Q", *(ref.generation for ref in refs)),
        predict=pb.Predict(
            num_candidates=len(refs),
            budget_blocks=2,
            position=position,
            hidden=torch.randn(3, SPEC.hidden_size, generator=numbers).numpy().tobytes(),
        ),
        **fields,
    )
    if audited:
        request.audits.add(
            layer_idx=1,
            position=position,
            query=torch.randn(SPEC.index_heads, SPEC.index_dims, generator=numbers).numpy().tobytes(),
            weights=torch.ones(SPEC.index_heads).numpy().tobytes(),
            resident=bytes(-(-len(refs) // 8)),
            topk=16,
        )
    return request
