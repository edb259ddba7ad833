"""The worker's process: peers first, then the model, then the loop and its gRPC edge."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog
from grpc_health.v1 import health_pb2

from forepage.coldpool.client import ColdPoolClient
from forepage.frames import WorkerFrame
from forepage.from_zero import begin_at_zero
from forepage.logs import open_logs
from forepage.model.rank_group import RankLostError
from forepage.model.tensor_parallel import check_split
from forepage.rpc import worker_pb2_grpc as rpc
from forepage.rpc.edge import serving
from forepage.rpc.tls import MutualTls
from forepage.settings import Settings
from forepage.span_log import span_log_processors
from forepage.telemetry import open_telemetry
from forepage.worker.arena_access import ArenaAccess
from forepage.worker.arena_mapping import PinnedArena
from forepage.worker.assembly import ModelFolder, assemble, device_of
from forepage.worker.card import keep_card
from forepage.worker.gauges import observe_worker
from forepage.worker.index_client import IndexClient
from forepage.worker.loop import Loop
from forepage.worker.rank_processes import followers
from forepage.worker.readiness import Readiness
from forepage.worker.servicer import DecodeWorker
from forepage.worker.warm_up import WarmUp

POLL_S = 0.2
_log = structlog.get_logger("forepage.worker")


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain: no new requests, sequences end, everything is given back.

    Raises: ModelFormatError for the model folder, SettingsError for more ranks than GPUs, DependencyError
    for a cold pool that does not answer, an address that can't be bound or a rank that ended, and whatever
    broke the loop.
    """
    open_logs("worker", settings.telemetry)
    telemetry = open_telemetry(
        "worker",
        instance_id=settings.worker.worker_id,
        metrics_port=settings.worker.metrics_port,
        span_processors=span_log_processors("worker", settings.telemetry),
    )
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.close)
        begin_at_zero(telemetry, "worker")
        tls = MutualTls.read(settings.tls)
        folder = ModelFolder.read(settings.model)
        check_split(folder.spec, settings.worker.tensor_parallel)
        client = ColdPoolClient(
            settings.worker.coldpool_address,
            holder_id=settings.worker.worker_id,
            slot_bytes=folder.geometry.slot_bytes,
            model_fingerprint=folder.fingerprint,
            telemetry=telemetry,
            on_reattach=lambda news: loop.take_reattached(news),
            tls=tls,
        )
        stack.push_async_callback(client.close)
        await client.attach()
        index = IndexClient(
            settings.worker.index_address,
            on_reply=lambda reply: loop.take_reply(reply),
            on_down=lambda: loop.index_down(),
            tls=tls,
        )
        device = device_of(settings.model, num_ranks=settings.worker.tensor_parallel)
        arena = PinnedArena(client.view, device)
        stack.callback(arena.close)
        access = ArenaAccess(client, asyncio.get_running_loop())
        ranks = await stack.enter_async_context(followers(settings, client.arena_path, client.view.uuid))
        build = partial(assemble, arena_port=access, index=index, telemetry=telemetry)
        joined = await ranks.meet(device)
        parts = await asyncio.to_thread(build, settings, folder, device, arena.tensor, ranks=joined)
        stack.callback(parts.device.close)
        await ranks.begin()
        loop = Loop(parts, arena.tensor)
        observe_worker(parts, loop)
        identity = folder.card(settings.worker)
        readiness = Readiness(arena, WarmUp.of(parts))
        servicer = DecodeWorker(loop, parts, identity, folder.grammar(), readiness, eos=folder.eos)
        async with _beside(loop.give_up, index.run(), client.watch(), ranks.watch(loop.give_up)):
            await _serve(settings, stop, loop, servicer, readiness, identity, tls)
        if loop.broken is not None:
            raise loop.broken
        if not loop.is_running:
            with contextlib.suppress(RankLostError):  # gone just now, when it is not needed any more
                await asyncio.to_thread(parts.device.stop_ranks)


async def _serve(
    settings: Settings,
    stop: asyncio.Event,
    loop: Loop,
    servicer: DecodeWorker,
    readiness: Readiness,
    identity: WorkerFrame,
    tls: MutualTls | None,
) -> None:
    """From here on the worker answers; it is ready, and found by gateways, once it is prepared."""
    drain_s = settings.worker.drain_timeout_s
    async with serving(
        settings.worker.listen,
        lambda server: rpc.add_DecodeWorkerServicer_to_server(servicer, server),
        tls=tls,
        drain_s=drain_s,
        ready=False,
    ) as (port, health):
        await readiness.prepare(lambda: stop.is_set() or loop.broken is not None)
        if not readiness.is_ready:
            return
        loop.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        _log.info("worker ready", port=port, worker=identity.worker_id, model=identity.model_name)
        async with _beside(loop.give_up, keep_card(settings, identity)):
            while not stop.is_set() and loop.broken is None:
                await _pause(stop)
            servicer.draining = True
            await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(servicer.drained(), drain_s)
            await asyncio.to_thread(loop.stop, drain_s)


async def _pause(stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), POLL_S)


@asynccontextmanager
async def _beside(
    on_failure: Callable[[BaseException], None], *coroutines: Coroutine[Any, Any, None]
) -> AsyncIterator[None]:
    """Tasks that run as long as the block does; `on_failure` hears of one that breaks.

    A worker that lost one would go on without index, cold pool or card, and nobody would know.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.error("a task of this worker broke; the worker stops", error=repr(error), exc_info=error)
        on_failure(error)

    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
