"""What runs now: asks the gateway, every worker, the index and the cold pool by the endpoints they have.

Nothing is started or changed. Who does not answer within the timeout is down, and that is an answer too.
"""

import asyncio
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from forepage.errors import DependencyError
from forepage.gateway.redis_workers import RedisWorkers
from forepage.launch.health import Role, dialable, http_json, listen_of, role_is_ready
from forepage.launch.run_card import RunCard, running_card
from forepage.redis_client import open_redis
from forepage.rpc import coldpool_pb2, coldpool_pb2_grpc, worker_pb2, worker_pb2_grpc
from forepage.rpc.edge import is_serving, open_channel
from forepage.rpc.tls import MutualTls
from forepage.settings import Settings
from forepage.telemetry import open_telemetry

TIMEOUT_S = 3.0
_GPU_QUERY = ("index", "name", "memory.used", "memory.total", "utilization.gpu")
MIB = 1 << 20


@dataclass(frozen=True)
class ProcessStatus:
    """One process; `detail` is what it says of itself, empty while it does not answer."""

    role: Role
    address: str
    ready: bool
    detail: str = ""


@dataclass(frozen=True)
class WorkerStatus:
    """One worker and its sequences; both None while it does not answer."""

    address: str
    described: worker_pb2.DescribeReply | None = None
    sequences: tuple[worker_pb2.WatchedSequence, ...] = ()


@dataclass(frozen=True)
class GpuStatus:
    """One GPU of this host as its driver sees it."""

    index: str
    name: str
    used_bytes: int
    total_bytes: int
    utilization_percent: str


@dataclass(frozen=True)
class Status:
    """All of it. `arena` and `arena_bytes` are None while the cold pool does not answer."""

    instance: str
    version: str | None
    models: tuple[str, ...]
    card: RunCard | None
    processes: tuple[ProcessStatus, ...]
    workers: tuple[WorkerStatus, ...]
    gpus: tuple[GpuStatus, ...]
    arena: coldpool_pb2.StatReply | None = None
    arena_bytes: int | None = None

    @property
    def all_ready(self) -> bool:
        """Whether every process takes work."""
        return all(process.ready for process in self.processes)


async def read_status(settings: Settings, *, timeout_s: float = TIMEOUT_S) -> Status:
    """Ask everybody at once. Where `forepage up` runs this instance, its addresses are used."""
    card = running_card(settings.coldpool.shm_dir, settings.instance)
    settings = settings if card is None else _placed_as(settings, card)
    addresses = await _worker_addresses(settings, card)
    tls = MutualTls.read(settings.tls)
    gateway, index, arena, workers, gpus = await asyncio.gather(
        _gateway(settings, timeout_s),
        _index(settings, tls, timeout_s),
        _arena(settings, tls, timeout_s),
        asyncio.gather(*(_worker(address, tls, timeout_s) for address in addresses)),
        _gpus(timeout_s),
    )
    version, models, gateway_status = gateway
    return Status(
        instance=settings.instance,
        version=version,
        models=models or _models_of(workers),
        card=card,
        processes=(
            gateway_status,
            index,
            _coldpool_status(settings, arena),
            *(_worker_status(worker) for worker in workers),
        ),
        workers=tuple(workers),
        gpus=gpus,
        arena=arena,
        arena_bytes=_arena_bytes(settings),
    )


def _models_of(workers: Iterable[WorkerStatus]) -> tuple[str, ...]:
    """As the workers say: a gateway with API keys does not tell without one."""
    return tuple(dict.fromkeys(one.described.model_name for one in workers if one.described is not None))


def _placed_as(settings: Settings, card: RunCard) -> Settings:
    """The tree with the addresses that `forepage up` really uses."""
    host, _, port = card.addresses[Role.GATEWAY].rpartition(":")
    sections: dict[str, dict[str, object]] = {
        Role.GATEWAY: {"host": host, "port": int(port)},
        **{role: {"listen": card.addresses[role]} for role in (Role.INDEX, Role.COLDPOOL, Role.WORKER)},
    }
    updates = {name: getattr(settings, name).model_copy(update=update) for name, update in sections.items()}
    return settings.model_copy(update=updates)


async def _worker_addresses(settings: Settings, card: RunCard | None) -> Sequence[str]:
    """Those that the gateway would find; without any, where one of this host would listen."""
    fallback = [dialable(settings.worker.listen)]
    if card is not None:
        return fallback
    if settings.gateway.worker_addresses:
        return settings.gateway.worker_addresses
    if settings.redis_url is None:
        return fallback
    telemetry = open_telemetry("status", instance_id="status")
    client = open_redis(settings.redis_url.get_secret_value(), settings.tls)
    source = RedisWorkers(client, settings.instance, telemetry)
    try:
        return await source.addresses() or fallback
    except DependencyError:
        return fallback
    finally:
        await source.close()
        telemetry.close()


async def _gateway(settings: Settings, timeout_s: float) -> tuple[str | None, tuple[str, ...], ProcessStatus]:
    ready, load, version, models = await asyncio.gather(
        role_is_ready(Role.GATEWAY, settings, timeout_s=timeout_s),
        http_json(settings, "/load", timeout_s=timeout_s),
        http_json(settings, "/version", timeout_s=timeout_s),
        http_json(settings, "/v1/models", timeout_s=timeout_s),
    )
    detail = "" if load is None else f"{load['running']} of {load['max_running']} generations"
    if load is not None and not ready:
        detail += ", no worker to be reached, or draining"
    address = dialable(listen_of(Role.GATEWAY, settings))
    names = tuple(str(item["id"]) for item in models["data"]) if models else ()
    return (
        str(version["version"]) if version else None,
        names,
        ProcessStatus(Role.GATEWAY, address, ready, detail),
    )


async def _index(settings: Settings, tls: MutualTls | None, timeout_s: float) -> ProcessStatus:
    address = dialable(settings.index.listen)
    return ProcessStatus(Role.INDEX, address, await is_serving(address, tls, timeout_s=timeout_s))


async def _arena(
    settings: Settings, tls: MutualTls | None, timeout_s: float
) -> coldpool_pb2.StatReply | None:
    async with open_channel(dialable(settings.coldpool.listen), tls) as channel:
        try:
            reply: coldpool_pb2.StatReply = await coldpool_pb2_grpc.ColdPoolStub(channel).Stat(
                coldpool_pb2.StatRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError:
            return None
    return reply


async def _worker(address: str, tls: MutualTls | None, timeout_s: float) -> WorkerStatus:
    """Its description, and the first snapshot of who watches: what every sequence holds."""
    async with open_channel(address, tls) as channel:
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        try:
            described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return WorkerStatus(address)
        watching = stub.Watch(worker_pb2.WatchRequest(interval_ms=1000), timeout=timeout_s)
        try:
            frame = await anext(aiter(watching))
        except (grpc.aio.AioRpcError, StopAsyncIteration):  # its loop is busy with a long step
            return WorkerStatus(address, described)
        finally:
            watching.cancel()
    return WorkerStatus(address, described, tuple(frame.sequences))


def _coldpool_status(settings: Settings, arena: coldpool_pb2.StatReply | None) -> ProcessStatus:
    address = dialable(settings.coldpool.listen)
    if arena is None:
        return ProcessStatus(Role.COLDPOOL, address, ready=False)
    return ProcessStatus(Role.COLDPOOL, address, ready=True, detail=f"holders: {arena.holders}")


def _worker_status(worker: WorkerStatus) -> ProcessStatus:
    found = worker.described
    if found is None:
        return ProcessStatus(Role.WORKER, worker.address, ready=False)
    detail = (
        f"{found.worker_id}: {found.model_name}, {found.running} of {found.max_running} sequences, "
        f"{found.waiting} waiting"
    )
    return ProcessStatus(
        Role.WORKER, worker.address, not found.draining, detail + (", draining" if found.draining else "")
    )


def _arena_bytes(settings: Settings) -> int | None:
    try:
        return (settings.coldpool.shm_dir / f"forepage-{settings.instance}-arena").stat().st_size
    except OSError:
        return None


async def _gpus(timeout_s: float) -> tuple[GpuStatus, ...]:
    """What nvidia-smi says; none where it is not installed or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = (f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits")
    asked = await asyncio.create_subprocess_exec(
        tool, *query, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        output, _ = await asyncio.wait_for(asked.communicate(), timeout_s)
    except TimeoutError:
        asked.kill()
        await asked.wait()
        return ()
    return parse_gpus(output.decode())


def parse_gpus(text: str) -> tuple[GpuStatus, ...]:
    """A GPU a line of nvidia-smi's CSV; lines of another form are left out."""
    rows = (tuple(cell.strip() for cell in line.split(",")) for line in text.splitlines())
    return tuple(
        GpuStatus(index, name, int(used) * MIB, int(total) * MIB, busy)
        for index, name, used, total, busy in (row for row in rows if len(row) == len(_GPU_QUERY))
        if used.isdigit() and total.isdigit()
    )
