"""The worker's gRPC edge: requests in, events out; everything in between is the loop's."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from opentelemetry.trace import SpanKind

from forepage.errors import CapacityError, DependencyError, ForepageError
from forepage.frames import WorkerFrame
from forepage.kv.prefix_hash import PrefixHasher
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc as rpc
from forepage.rpc.edge import abort, metadata_of
from forepage.telemetry import SpanName
from forepage.trace_context import incoming_context
from forepage.worker.constraint import GrammarTokenizer
from forepage.worker.loop import Loop
from forepage.worker.outbox import Events, Outbox, joined
from forepage.worker.parts import WorkerParts
from forepage.worker.readiness import Readiness
from forepage.worker.request import PROTO_OF_MODE, Request
from forepage.worker.sequence import Sequence

IDLE_POLL_S = 0.05
WATCH_EVERY_S = 0.2
"""Snapshots for one who watches come no faster than this."""
MAX_WATCHING = 16


class DecodeWorker(rpc.DecodeWorkerServicer):
    """Requests in, events out; everything in between is the loop's."""

    def __init__(
        self,
        loop: Loop,
        parts: WorkerParts,
        identity: WorkerFrame,
        grammar: GrammarTokenizer,
        readiness: Readiness,
        *,
        eos: int,
    ) -> None:
        self._loop = loop
        self._readiness = readiness
        self._parts = parts
        self._identity = identity
        self._grammar = grammar
        self._eos = eos
        self._outbox = Outbox(asyncio.get_running_loop())
        self.draining = False
        self._num_watching = 0

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateEvent]:
        """One generation; cancelling the call frees everything the sequence holds."""
        try:
            if self.draining or self._loop.broken is not None:
                raise DependencyError("this worker takes no more requests", None, 1.0)
            if not self._readiness.is_ready:
                raise DependencyError(f"this worker is not ready: {self._readiness.progress}", None, 5.0)
            asked = Request.parse(
                request, self._parts.settings, vocab_size=self._parts.device.spec.vocab_size, eos=self._eos
            )
            constraint = await asyncio.to_thread(self._grammar.constraint_of, asked)
        except ForepageError as error:
            await abort(context, error)
        events: Events = asyncio.Queue()
        sequence = self._sequence(asked, events, metadata_of(context))
        sequence.constraint = constraint
        self._loop.submit(sequence)
        try:
            while True:
                for event in joined(await events.get(), events):
                    yield event
                    if event.WhichOneof("event") in ("finished", "failed"):
                        return
        finally:
            self._loop.cancel(sequence)

    async def Describe(  # noqa: N802
        self,
        _: pb.DescribeRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002
    ) -> pb.DescribeReply:
        """Who this is and how busy."""
        return self._description()

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchFrame]:
        """What every sequence holds, until the caller leaves; a snapshot that equals the last is not sent."""
        if self._num_watching >= MAX_WATCHING:
            await abort(context, CapacityError(f"{MAX_WATCHING} already watch this worker", None, 5.0))
        self._num_watching += 1
        try:
            last: pb.WatchFrame | None = None
            while (views := await self._views()) is not None:
                frame = pb.WatchFrame(worker=self._description(), sequences=views)
                if frame != last:
                    yield frame
                last = frame
                await asyncio.sleep(max(WATCH_EVERY_S, request.interval_ms / 1e3))
        finally:
            self._num_watching -= 1
        await abort(context, DependencyError("this worker has stopped", None, 1.0))

    async def _views(self) -> list[pb.WatchedSequence] | None:
        """The loop's next snapshot; None once it takes no more messages."""
        asked = asyncio.wrap_future(self._loop.watch())
        try:
            while self._loop.broken is None and (self._loop.is_running or not self.draining):
                done, _ = await asyncio.wait({asked}, timeout=WATCH_EVERY_S)
                if done:
                    return asked.result()
            return None
        finally:
            asked.cancel()

    def _description(self) -> pb.DescribeReply:
        blocks, settings = self._parts.blocks, self._parts.settings
        return pb.DescribeReply(
            worker_id=self._identity.worker_id,
            model_name=self._identity.model_name,
            model_fingerprint=self._identity.model_fingerprint,
            max_context_tokens=settings.max_context_tokens,
            default_mode=PROTO_OF_MODE[settings.default_mode],
            running=self._loop.num_running,
            waiting=self._loop.num_waiting,
            max_running=settings.max_running,
            row_blocks_free=blocks.rows.num_free,
            row_blocks_total=blocks.rows.total,
            key_blocks_free=blocks.keys.num_free,
            key_blocks_total=blocks.keys.total,
            slots_free=blocks.slots.num_free,
            arena_slots_held=self._parts.arena.num_leases,
            device=self._parts.device.description,
            draining=self.draining,
        )

    async def drained(self) -> None:
        """Until no sequence is left or the loop broke; it counts them on its own thread, so this polls."""
        while self._loop.num_sequences and self._loop.broken is None:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)

    def _sequence(self, asked: Request, events: Events, metadata: Mapping[str, str]) -> Sequence:
        outbox = self._outbox
        span = self._parts.telemetry.start_span(
            SpanName.WORKER_GENERATE,
            incoming_context(metadata),
            kind=SpanKind.SERVER,
            sequence_id=asked.request_id,
            worker_id=self._identity.worker_id,
            mode=asked.mode.value,
            input_tokens=len(asked.prompt),
        )

        def emit(event: pb.GenerateEvent) -> None:
            outbox.put(events, event)

        hasher = PrefixHasher(
            self._identity.model_fingerprint, self._parts.geometry.block_tokens, asked.cache_salt
        )
        return Sequence.start(asked, emit=emit, span=span, hasher=hasher, settings=self._parts.settings)
