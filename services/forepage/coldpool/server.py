"""The cold pool manager's process: puts the pool together, serves it, and runs the tasks behind it.

A clean shutdown takes the arena and the holders' locks with it; any other end leaves them, and the next
manager adopts the arena. One manager an instance: a lock says so.
"""

import asyncio
import json
import secrets
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from redis.asyncio import Redis

from forepage.coldpool.arena import Arena, arena_path
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.directory import Directory
from forepage.coldpool.disk_tier import DiskTier
from forepage.coldpool.holder_lock import ProcessLock
from forepage.coldpool.holders import HolderRegistry
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.redis_tier import RedisTier
from forepage.coldpool.servicer import ArenaLeases
from forepage.coldpool.shm_names import manager_lock_path
from forepage.coldpool.tiers import RecordTier, RecordTiers
from forepage.coldpool.upkeep import reap_holders, scrub
from forepage.errors import CapacityError, DependencyError, ForepageError, ModelFormatError
from forepage.from_zero import begin_at_zero
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.logs import open_logs
from forepage.redis_client import open_redis
from forepage.rpc.coldpool_pb2_grpc import add_ColdPoolServicer_to_server
from forepage.rpc.edge import serving
from forepage.rpc.tls import MutualTls
from forepage.settings import ModelSettings, Settings, Tier
from forepage.span_log import span_log_processors
from forepage.telemetry import Telemetry, open_telemetry

FLUSH_S = 2.0
"""How long a clean shutdown may take to empty the directory queue."""
_FIRST_GENERATION_BITS = 40
"""A new arena starts at a random generation, so that refs into an older one match nothing in it."""
_log = structlog.get_logger("forepage.coldpool")


@dataclass(frozen=True)
class _Parts:
    pool: ColdPool
    holders: HolderRegistry
    directory: Directory | None
    is_new: bool
    """The arena was made by this process, not adopted."""


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Be the cold pool manager until `stop`.

    Raises: DependencyError (address taken, other manager, missing folder or Redis setting), CapacityError
    (no room for the arena), ModelFormatError (no config to compute the slot size from).
    """
    open_logs("coldpool", settings.telemetry)
    telemetry = open_telemetry(
        "coldpool",
        instance_id=settings.instance,
        metrics_port=settings.coldpool.metrics_port,
        span_processors=span_log_processors("coldpool", settings.telemetry),
    )
    begin_at_zero(telemetry, "coldpool")
    try:
        await serve(settings, stop, telemetry)
    except ExceptionGroup as group:
        if len(group.exceptions) == 1 and isinstance(group.exceptions[0], ForepageError):
            raise group.exceptions[0] from group  # the one reason, as our caller expects it
        raise
    finally:
        telemetry.close()


async def serve(settings: Settings, stop: asyncio.Event, telemetry: Telemetry) -> None:
    """`run` with the telemetry given."""
    tls = MutualTls.read(settings.tls)
    async with AsyncExitStack() as stack:
        stack.callback(_lock_instance(settings).release)
        redis = await stack.enter_async_context(_open_redis(settings))
        parts = await _open_parts(settings, redis, telemetry)
        stack.callback(parts.holders.close)
        unserved = stack.enter_context(ExitStack())
        if parts.is_new:  # a start that fails leaves nothing behind
            unserved.callback(parts.pool.arena.unlink)
        servicer = ArenaLeases(parts.pool, parts.holders, epoch=uuid.uuid4().hex, telemetry=telemetry)
        await _serve_until(settings, stop, servicer, parts, tls, on_serving=unserved.pop_all)
        await _leave(parts)


async def _serve_until(
    settings: Settings,
    stop: asyncio.Event,
    servicer: ArenaLeases,
    parts: _Parts,
    tls: MutualTls | None,
    *,
    on_serving: Callable[[], object],
) -> None:
    coldpool = settings.coldpool

    def register(server: grpc.aio.Server) -> None:
        add_ColdPoolServicer_to_server(servicer, server)

    async with asyncio.TaskGroup() as tasks:
        upkeep = [
            tasks.create_task(reap_holders(parts.pool, parts.holders, interval_s=coldpool.probe_interval_s))
        ]
        if coldpool.scrub_bytes_per_s:
            upkeep.append(tasks.create_task(scrub(parts.pool, bytes_per_s=coldpool.scrub_bytes_per_s)))
        if parts.directory is not None:
            upkeep.append(tasks.create_task(parts.directory.run()))
        drain_s = coldpool.drain_timeout_s
        async with serving(coldpool.listen, register, tls=tls, drain_s=drain_s) as (port, _):
            _log.info("serving", listen=coldpool.listen, port=port, slots=parts.pool.arena.num_slots)
            on_serving()
            await stop.wait()
        for task in upkeep:
            task.cancel()


async def _leave(parts: _Parts) -> None:
    """After a clean shutdown nothing of the arena stays: neither its memory nor the word of it."""
    if parts.directory is not None:
        parts.pool.leave_directory()
        with suppress(TimeoutError):
            await asyncio.wait_for(parts.directory.flush(), FLUSH_S)
    await parts.pool.tiers.close()
    parts.holders.remove_files()
    parts.pool.arena.unlink()
    _log.info("stopped")


def _lock_instance(settings: Settings) -> ProcessLock:
    lock = ProcessLock.try_acquire(manager_lock_path(settings.coldpool.shm_dir, settings.instance))
    if lock is None:
        raise DependencyError(
            f"another cold pool manager serves instance {settings.instance!r} on this host; "
            "stop it or set FOREPAGE_INSTANCE"
        )
    return lock


async def _open_parts(settings: Settings, redis: Redis | None, telemetry: Telemetry) -> _Parts:
    coldpool = settings.coldpool
    counters = ColdPoolCounters(telemetry)
    tiers = RecordTiers([_tier(kind, settings, redis, counters) for kind in coldpool.tiers], counters)
    identity = Identity(socket.gethostname(), settings.instance)
    directory = None
    if redis is not None:
        directory = Directory(
            redis,
            instance=settings.instance,
            host=identity.host,
            max_queued=coldpool.directory_queue,
            counters=counters,
        )
    holders = HolderRegistry(coldpool.shm_dir, settings.instance)
    arena, table, is_new = await asyncio.to_thread(_open_arena, settings, holders)
    await tiers.open()
    pool = ColdPool(
        arena,
        table,
        tiers=tiers,
        directory=directory,
        counters=counters,
        identity=identity,
        verify=coldpool.verify,
    )
    return _Parts(pool, holders, directory, is_new)


def _open_arena(settings: Settings, holders: HolderRegistry) -> tuple[Arena, LeaseTable, bool]:
    """Adopt the instance's arena if there is one of this shape, else make a new one (True)."""
    path = arena_path(settings.coldpool.shm_dir, settings.instance)
    slot_bytes = read_geometry(settings.model).slot_bytes
    num_slots = settings.coldpool.capacity_bytes // slot_bytes
    if num_slots == 0:
        raise CapacityError(
            f"FOREPAGE_COLDPOOL__CAPACITY_BYTES is {settings.coldpool.capacity_bytes}, "
            f"one slot of this model needs {slot_bytes}"
        )
    live = holders.find_live()
    arena = Arena.try_adopt(path, slot_bytes=slot_bytes, num_slots=num_slots)
    if arena is not None:
        table = LeaseTable(num_slots, first_generation=0)
        table.adopt(arena.headers(), live)
        counts = table.counts()
        _log.info("arena_adopted", slots=num_slots, free=counts.free, cached=counts.cached, waiting_for=live)
        return arena, table, False
    is_replaced = path.exists()
    arena = Arena.create(path, slot_bytes=slot_bytes, num_slots=num_slots)
    _log.info("arena_created", slots=num_slots, slot_bytes=slot_bytes, replaced=is_replaced)
    table = LeaseTable(num_slots, first_generation=secrets.randbits(_FIRST_GENERATION_BITS) + 1)
    return arena, table, True


def read_geometry(model: ModelSettings) -> KvGeometry:
    """Record sizes of the model folder. Raises: ModelFormatError without a usable config.json."""
    path: Path = model.path / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: {error}; see FOREPAGE_MODEL__PATH") from error
    if not isinstance(config, dict):
        raise ModelFormatError(f"{path}: no JSON object")
    return KvGeometry.from_config(config, KvFormat(model.kv_format), KeyFormat(model.key_format))


def _tier(kind: Tier, settings: Settings, redis: Redis | None, counters: ColdPoolCounters) -> RecordTier:
    coldpool = settings.coldpool
    if kind is Tier.DISK:
        if coldpool.disk_dir is None:
            raise DependencyError("FOREPAGE_COLDPOOL__TIERS names disk: set FOREPAGE_COLDPOOL__DISK_DIR")
        folder = coldpool.disk_dir / settings.instance
        return DiskTier(folder, max_bytes=coldpool.disk_bytes, counters=counters)
    if redis is None:
        raise DependencyError("FOREPAGE_COLDPOOL__TIERS names redis: set FOREPAGE_REDIS_URL")
    return RedisTier(
        redis, instance=settings.instance, max_bytes=coldpool.redis_tier_bytes, counters=counters
    )


@asynccontextmanager
async def _open_redis(settings: Settings) -> AsyncIterator[Redis | None]:
    """A client that fails fast: what needs Redis here has its own way of waiting for it."""
    if settings.redis_url is None:
        yield None
        return
    client = open_redis(settings.redis_url.get_secret_value(), settings.tls)
    try:
        yield client
    finally:
        await client.aclose()
