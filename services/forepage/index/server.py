"""The index process: loads the memory indexer, maps the arena once there is one, serves until stopped."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
import torch
from grpc_health.v1 import health_pb2

from forepage.coldpool.arena import arena_path
from forepage.errors import ForepageError
from forepage.from_zero import begin_at_zero
from forepage.index.key_store import KeyStore
from forepage.index.planner import Planner
from forepage.index.publisher import PlanPublisher, plan_stream
from forepage.index.question import QuestionLimits
from forepage.index.scorer import BlockScorer, Scorer
from forepage.index.servicer import LookaheadServicer
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.logs import open_logs
from forepage.model.memory_indexer import MemoryIndexer
from forepage.model.spec import ModelSpec, read_config
from forepage.redis_client import open_redis
from forepage.rpc.edge import serving
from forepage.rpc.index_pb2_grpc import add_LookaheadIndexServicer_to_server
from forepage.rpc.tls import MutualTls
from forepage.settings import IndexSettings, Settings
from forepage.span_log import span_log_processors
from forepage.telemetry import Telemetry, open_telemetry

ARENA_POLL_S = 0.1
FLUSH_S = 1.0
UNLOCK_S = 15.0
"""For giving page-locked memory back at the end; one piece of it takes about 5 s."""
_log = structlog.get_logger("forepage.index")

Scoring = Callable[[Scorer], BlockScorer]
"""What scores, given the memory indexer's scorer."""


def by_memory_indexer(scorer: Scorer) -> BlockScorer:
    """The memory indexer's own scores."""
    return scorer


async def run(settings: Settings, stop: asyncio.Event, scoring: Scoring = by_memory_indexer) -> None:
    """Serve until `stop`. Health says SERVING while an arena can be read; else questions get an error.

    Plans are made of what `scoring` says: a load test's model has random weights, and nothing to predict.
    Raises: ModelFormatError for the model folder, DependencyError when the address can't be bound.
    """
    open_logs("index", settings.telemetry)
    tls = MutualTls.read(settings.tls)
    telemetry = open_telemetry(
        "index",
        instance_id=settings.instance,
        metrics_port=settings.index.metrics_port,
        span_processors=span_log_processors("index", settings.telemetry),
    )
    begin_at_zero(telemetry, "index")
    # Questions run beside each other instead: threads that share one wait for the slowest at every
    # operation, which on a busy 2-core host made scoring 1M tokens 5 to 100 times slower.
    torch.set_num_threads(1)
    try:
        async with asyncio.TaskGroup() as tasks:
            await _serve(settings, stop, tasks, telemetry, tls, scoring)
    except ExceptionGroup as group:
        ours, others = group.split(ForepageError)
        if ours is not None and others is None:
            raise ours.exceptions[0] from None  # why the process can't run, as its caller expects it
        raise
    finally:
        telemetry.close()


async def _serve(
    settings: Settings,
    stop: asyncio.Event,
    tasks: asyncio.TaskGroup,
    telemetry: Telemetry,
    tls: MutualTls | None,
    scoring: Scoring,
) -> None:
    async with _publishing(settings, tasks, telemetry) as publisher:
        servicer, store = build_servicer(settings, publisher, telemetry, scoring)

        def register(server: grpc.aio.Server) -> None:
            add_LookaheadIndexServicer_to_server(servicer, server)

        listen, drain_s = settings.index.listen, settings.index.drain_timeout_s
        async with serving(listen, register, tls=tls, drain_s=drain_s, ready=False) as (port, health):
            _log.info("index listens", port=port)
            watching = tasks.create_task(_watch_arena(store, health))
            await stop.wait()
            watching.cancel()
            servicer.drain()
        if not await asyncio.to_thread(store.close, UNLOCK_S):
            _log.warning("page-locked memory of the arena is still in use; the kernel takes it back")


@asynccontextmanager
async def _publishing(
    settings: Settings,
    tasks: asyncio.TaskGroup,
    telemetry: Telemetry,
) -> AsyncIterator[PlanPublisher | None]:
    """A running publisher, or None without a Redis; on leaving, queued plans get a moment to go out."""
    if settings.redis_url is None:
        yield None
        return
    async with open_redis(settings.redis_url.get_secret_value(), settings.tls) as redis:
        publisher = PlanPublisher(
            redis,
            stream=plan_stream(settings.instance),
            maxlen=settings.index.plan_stream_maxlen,
            telemetry=telemetry,
        )
        running = tasks.create_task(publisher.run())
        try:
            yield publisher
            await publisher.flush(FLUSH_S)
        finally:
            running.cancel()
            await asyncio.wait({running})


async def _watch_arena(store: KeyStore, health: Any) -> None:
    """Look for the arena, and for one that replaces it; health follows, each new reason is logged."""
    states, last = health_pb2.HealthCheckResponse, ("", "")
    while True:
        uuid = reason = ""
        try:
            uuid = store.current().uuid
        except ForepageError as error:
            reason = str(error)
        if (uuid, reason) != last:
            last = uuid, reason
            await health.set("", states.SERVING if uuid else states.NOT_SERVING)
            if uuid:
                _log.info("arena mapped", arena=uuid)
            else:
                _log.warning("no arena to read keys from yet", error=reason)
        await asyncio.sleep(ARENA_POLL_S)


def build_servicer(
    settings: Settings,
    publisher: PlanPublisher | None,
    telemetry: Telemetry,
    scoring: Scoring = by_memory_indexer,
) -> tuple[LookaheadServicer, KeyStore]:
    """Everything behind the stream, from the settings. Raises: ModelFormatError for the model folder."""
    model = settings.model
    config = read_config(model.path)
    spec = ModelSpec.from_config(config)
    geometry = KvGeometry.from_config(config, KvFormat(model.kv_format), KeyFormat(model.key_format))
    device = _device(settings.index)
    indexer = MemoryIndexer.load(model.path, spec, geometry.format, device, model.memory_indexer)
    store = KeyStore(arena_path(settings.coldpool.shm_dir, settings.instance), geometry, device)
    limits = QuestionLimits.of_model(
        spec,
        geometry,
        num_target_layers=len(indexer.target_layers),
        threshold=_threshold(settings.index, indexer),
    )
    scorer = Scorer(indexer, geometry, device)
    if device.type == "cuda":
        scorer.warm_up()
    servicer = LookaheadServicer(
        store,
        Planner(scoring(scorer), limits),
        publisher=publisher,
        telemetry=telemetry,
        max_inflight=settings.index.max_inflight,
        clock=time.monotonic,
    )
    return servicer, store


def _device(settings: IndexSettings) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _threshold(settings: IndexSettings, indexer: MemoryIndexer) -> float:
    """The one set by the operator, else the one the indexer was calibrated with."""
    return indexer.threshold if settings.threshold is None else settings.threshold
