"""The worker's process: gRPC edge, peers and the loop's thread. `run` shows what is made of what."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
import torch
from opentelemetry.trace import SpanKind

from forepage.coldpool.client import ColdPoolClient
from forepage.errors import DependencyError, ForepageError
from forepage.frames import WorkerFrame
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.kv.prefix_hash import PrefixHasher
from forepage.model.fingerprint import model_fingerprint
from forepage.model.memory_indexer import read_indexer_config
from forepage.model.spec import ModelSpec, read_config
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc as rpc
from forepage.rpc.edge import abort, metadata_of, serving
from forepage.settings import Settings
from forepage.telemetry import SpanName, Telemetry, incoming_context, open_logs, open_telemetry
from forepage.worker.arena_access import ArenaAccess
from forepage.worker.arena_mapping import arena_tensor, unregister
from forepage.worker.card import keep_card
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.gpu_blocks import GpuBlocks, PoolSizes
from forepage.worker.index_client import IndexClient
from forepage.worker.loop import Loop
from forepage.worker.parts import WorkerParts
from forepage.worker.request import PROTO_OF_MODE, Request
from forepage.worker.sequence import Sequence

IDLE_POLL_S = 0.05


class DecodeWorker(rpc.DecodeWorkerServicer):
    """Requests in, events out; everything in between is the loop's."""

    def __init__(self, loop: Loop, parts: WorkerParts, identity: WorkerFrame, *, eos: int) -> None:
        self._loop = loop
        self._parts = parts
        self._identity = identity
        self._eos = eos
        self.draining = False

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateEvent]:
        """One generation; cancelling the call frees everything the sequence holds."""
        try:
            if self.draining or self._loop.broken is not None:
                raise DependencyError("this worker takes no more requests", None, 1.0)
            asked = Request.parse(
                request, self._parts.settings, vocab_size=self._parts.model.spec.vocab_size, eos=self._eos
            )
        except ForepageError as error:
            await abort(context, error)
        events: asyncio.Queue[pb.GenerateEvent] = asyncio.Queue()
        sequence = self._sequence(asked, events, metadata_of(context))
        self._loop.submit(sequence)
        try:
            while True:
                event = await events.get()
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
            device=str(blocks.device),
            draining=self.draining,
        )

    async def drained(self) -> None:
        """Until no sequence is left; the loop counts them on its own thread, so this polls."""
        while self._loop.num_sequences:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_POLL_S)

    def _sequence(
        self, asked: Request, events: asyncio.Queue[pb.GenerateEvent], metadata: Mapping[str, str]
    ) -> Sequence:
        loop = asyncio.get_running_loop()
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
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        hasher = PrefixHasher(
            self._identity.model_fingerprint, self._parts.geometry.block_tokens, asked.cache_salt
        )
        return Sequence.start(asked, emit=emit, span=span, hasher=hasher, settings=self._parts.settings)


@dataclass(frozen=True)
class _Peers:
    """What exists before the model is loaded."""

    config: dict[str, object]
    geometry: KvGeometry
    device: torch.device
    arena: torch.Tensor
    arena_access: ArenaAccess
    index: IndexClient


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain: no new requests, sequences end, everything is given back."""
    log = open_logs("worker", settings.telemetry)
    telemetry = open_telemetry(
        "worker", instance_id=settings.worker.worker_id, metrics_port=settings.worker.metrics_port
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(telemetry.close)
        config = read_config(settings.model.path)
        geometry = KvGeometry.from_config(config, KvFormat(settings.model.kv_format))
        fingerprint = model_fingerprint(settings.model.path, geometry.format)
        client = ColdPoolClient(
            settings.worker.coldpool_address,
            holder_id=settings.worker.worker_id,
            slot_bytes=geometry.slot_bytes,
            model_fingerprint=fingerprint,
            telemetry=telemetry,
            on_reattach=lambda news: loop.take_reattached(news),
        )
        await client.attach()
        stack.push_async_callback(client.close)
        index = IndexClient(
            settings.worker.index_address,
            on_reply=lambda reply: loop.take_reply(reply),
            on_down=lambda: loop.index_down(),
        )
        device = _device(settings.model.device)
        arena = arena_tensor(client.view, device)
        stack.callback(unregister, arena, device)
        access = ArenaAccess(client, asyncio.get_running_loop())
        peers = _Peers(config, geometry, device, arena, access, index)
        parts = await asyncio.to_thread(_assemble, settings, peers, telemetry)
        loop = Loop(parts, arena)
        identity = WorkerFrame(
            worker_id=settings.worker.worker_id,
            address=settings.worker.advertise or settings.worker.listen,
            model_name=str(config.get("forepage_name") or settings.model.path.name),
            model_fingerprint=fingerprint,
            max_context_tokens=settings.worker.max_context_tokens,
            draining=False,
        )
        eos = config.get("eos_token_id")
        servicer = DecodeWorker(loop, parts, identity, eos=eos if isinstance(eos, int) else 1)
        loop.start()
        tasks = [
            asyncio.create_task(index.run()),
            asyncio.create_task(client.watch()),
            asyncio.create_task(keep_card(settings, identity)),
        ]
        async with serving(
            settings.worker.listen,
            lambda server: rpc.add_DecodeWorkerServicer_to_server(servicer, server),
            drain_s=settings.worker.drain_timeout_s,
        ):
            log.info("worker ready", listen=settings.worker.listen, device=str(parts.blocks.device))
            await _until_stopped_or_broken(stop, loop)
            servicer.draining = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(servicer.drained(), settings.worker.drain_timeout_s)
            await asyncio.to_thread(loop.stop, settings.worker.drain_timeout_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        parts.copies.close()
        if loop.broken is not None:
            raise loop.broken


def _assemble(settings: Settings, peers: _Peers, telemetry: Telemetry) -> WorkerParts:
    """Model, memory and peers of one worker. Raises: ModelFormatError for the model folder."""
    device, geometry = peers.device, peers.geometry
    spec = ModelSpec.from_config(peers.config)
    targets = read_indexer_config(settings.model.path, spec).target_layers
    weights = load_or_seed(settings.model.path, spec, dtype=torch.float32, device=device)
    blocks = GpuBlocks(
        geometry, PoolSizes.from_settings(settings.worker, geometry), topk=spec.index_topk, device=device
    )
    return WorkerParts(
        settings=settings.worker,
        geometry=geometry,
        topk=spec.index_topk,
        model=Transformer(
            spec, geometry, weights, device, target_layers=[spec.c4_layers[idx] for idx in targets]
        ),
        blocks=blocks,
        copies=CopyEngine(blocks.pools, peers.arena, geometry),
        arena=peers.arena_access,
        index=peers.index,
        telemetry=telemetry,
        log=structlog.get_logger("forepage.worker"),
    )


async def _until_stopped_or_broken(stop: asyncio.Event, loop: Loop) -> None:
    while not stop.is_set() and loop.broken is None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.2)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
