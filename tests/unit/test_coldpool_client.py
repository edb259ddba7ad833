"""Client and server in one process, over a Unix socket: the RPCs, their errors, spans, and lost replies."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from forepage.coldpool import attachment
from forepage.coldpool import client as client_module
from forepage.coldpool.call_gate import CallGate
from forepage.coldpool.client import ColdPoolClient, PublishedRecord, Reattached, RecordKind, SlotRef
from forepage.coldpool.records import payload_checksum
from forepage.coldpool.server import read_geometry, serve
from forepage.errors import CapacityError, DependencyError, ModelFormatError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.edge import is_serving
from forepage.settings import ColdpoolSettings, ModelSettings, Settings
from forepage.telemetry import SpanName, Telemetry, open_telemetry

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

    def settings(self, **coldpool: Any) -> Settings:
        coldpool = {"capacity_bytes": NUM_SLOTS * SLOT_BYTES, "probe_interval_s": 0.02, **coldpool}
        return Settings(
            instance="t",
            coldpool=ColdpoolSettings(listen=self.address, shm_dir=self.folder, **coldpool),
        )

    @asynccontextmanager
    async def manager(self, **coldpool: Any) -> AsyncIterator["Manager"]:
        stop = asyncio.Event()
        manager = Manager(stop, asyncio.create_task(serve(self.settings(**coldpool), stop, self.telemetry)))
        try:
            yield manager
        finally:
            stop.set()
            await asyncio.gather(manager.serving, return_exceptions=manager.serving.cancelled())

    @asynccontextmanager
    async def holder(
        self, name: str = "w0", *, on_reattach: Callable[[Reattached], None] | None = None
    ) -> AsyncIterator[ColdPoolClient]:
        client = ColdPoolClient(
            self.address,
            holder_id=name,
            slot_bytes=SLOT_BYTES,
            model_fingerprint="m",
            telemetry=self.telemetry,
            on_reattach=on_reattach,
        )
        try:
            await client.attach()
            yield client
        finally:
            await client.close()

    @asynccontextmanager
    async def holder_of_two_managers(
        self, on_reattach: Callable[[Reattached], None] | None
    ) -> AsyncIterator[tuple[ColdPoolClient, Callable[[], Awaitable[None]]]]:
        """A holder, and a way to replace its manager by a clean restart, which makes a new arena."""
        async with AsyncExitStack() as managers:
            first = await managers.enter_async_context(self.manager())

            async def replace() -> None:
                first.stop.set()
                await first.serving
                await managers.enter_async_context(self.manager())
                await until(lambda: is_serving(self.address, timeout_s=1.0))

            async with self.holder(on_reattach=on_reattach) as client:
                yield client, replace

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


@dataclass
class Manager:
    """A cold pool manager in this process."""

    stop: asyncio.Event
    serving: asyncio.Task[None]

    async def crash(self) -> None:
        """End without any of the clean-up: as far as others see, a kill."""
        self.serving.cancel()
        await asyncio.wait([self.serving])


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="fp-") as folder:
        yield Host(Path(folder))


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


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_prefix_written_by_one_holder_is_leased_by_another(host: Host) -> None:
    async with host.manager(), host.holder("a") as ann, host.holder("b") as bob:
        refs = await store(ann, "x", "y", "r")
        assert all(bob.view.matches(ref) for ref in refs)
        lease = await bob.lease_prefix([key_of("x"), key_of("y")], [b"", key_of("r")])
        assert (list(lease.blocks), list(lease.resume_parts), lease.num_blocks) == (refs[:2], refs[2:], 2)
        assert bytes(bob.view.payload(lease.blocks[1].arena_id)[:7]) == b"yyyyyyy"
        assert (ann.num_leases, bob.num_leases) == (3, 3)
        assert await ann.release(refs) == 0
        assert (await bob.stat()).leased == 3
        assert await bob.release([*lease.blocks, *lease.resume_parts]) == 0
        stat = await bob.stat()
        assert (stat.leased, stat.cached, stat.free, stat.holders) == (0, 3, NUM_SLOTS - 3, 2)
        assert ann.num_leases == bob.num_leases == 0


async def test_nothing_asked_for_is_no_call(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        host.spans.clear()
        assert await client.reserve(0) == []
        assert await client.publish([]) == []
        assert (await client.lease_prefix([], [])).num_blocks == 0
        assert await client.release([]) == 0
        assert host.spans.get_finished_spans() == ()


async def test_errors_arrive_typed(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        await client.reserve(NUM_SLOTS)
        with pytest.raises(CapacityError) as full:
            await client.reserve(1)
        assert full.value.retry_after_s
        with pytest.raises(RequestError) as repeated:
            await client.lease_prefix([key_of("a"), key_of("a")], [b"", b""])
        assert repeated.value.param == "block_keys"
        with pytest.raises(RequestError) as ragged:
            await client.lease_prefix([key_of("a")], [b"short"])
        assert ragged.value.param == "resume_keys"
        with pytest.raises(RequestError) as many:
            await client.reserve(NUM_SLOTS + 1)
        assert many.value.param == "count"


async def test_holder_of_another_model_is_refused(host: Host) -> None:
    async with host.manager():
        other = ColdPoolClient(
            host.address,
            holder_id="w",
            slot_bytes=4096,
            model_fingerprint="m",
            telemetry=host.telemetry,
        )
        with pytest.raises(ModelFormatError, match="FOREPAGE_MODEL__"):
            await other.attach()
        await other.close()


@pytest.mark.parametrize("holder_id", ["../../etc/x", "a b", "x" * 65, "nobody"])
async def test_holder_without_its_lock_is_refused(host: Host, holder_id: str) -> None:
    async with host.manager(), host.holder() as client:
        with pytest.raises(RequestError) as caught:
            await client._bond._attach(pb.AttachRequest(holder_id=holder_id, slot_bytes=SLOT_BYTES))
        assert caught.value.param == "holder_id"


async def test_where_the_arena_is_can_be_asked_without_a_name(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        reply = await client._bond._attach(pb.AttachRequest(slot_bytes=SLOT_BYTES))
        assert (reply.arena_uuid, reply.num_slots) == (client.view.uuid, NUM_SLOTS)
        assert (await client.stat()).holders == 1


async def test_name_in_use_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "_LOCK_TRIES", 2)
    monkeypatch.setattr(client_module, "ATTACH_TIMEOUT_S", 0.0)
    async with host.manager(), host.holder("w0"):
        with pytest.raises(DependencyError, match="locked by another process"):
            async with host.holder("w0"):
                pass


async def test_server_spans_are_children_of_the_callers(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        host.spans.clear()
        with host.telemetry.span(SpanName.WORKER_ADMIT) as parent:
            refs = await client.reserve(2, span=parent)
            await client.publish([write(client, refs[0], "a")], span=parent)
            await client.lease_prefix([key_of("a")], [b""], span=parent)
            await client.release(refs, span=parent)
            await client.reserve(NUM_SLOTS, span=parent)
            with pytest.raises(CapacityError):
                await client.reserve(1, span=parent)
        server = [span for span in host.spans.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert [span.name for span in server[:4]] == [
        SpanName.COLDPOOL_RESERVE,
        SpanName.COLDPOOL_PUBLISH,
        SpanName.COLDPOOL_LEASE,
        SpanName.COLDPOOL_RELEASE,
    ]
    assert {span.parent.span_id for span in server if span.parent} == {parent.get_span_context().span_id}
    assert server[-1].attributes is not None
    assert server[-1].attributes["error.type"] == "capacity_exhausted"


async def test_slots_are_on_the_gauge(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        refs = await store(client, "a", "b")
        await client.release(refs[:1])
        await client.reserve(1)
        assert host.counted("forepage.coldpool.slots") == {
            "free": NUM_SLOTS - 3,
            "writing": 1,
            "leased": 1,
            "cached": 1,
        }


async def test_close_gives_everything_back_at_once(host: Host) -> None:
    async with host.manager(probe_interval_s=60.0), host.holder("watcher") as watcher:
        async with host.holder() as client:
            await store(client, "a")
            await client.reserve(2)
        stat = await watcher.stat()
        assert (stat.writing, stat.leased, stat.cached) == (0, 0, 1)


@pytest.mark.parametrize("verb", ["Reserve", "LeasePrefix", "Publish"])
async def test_lost_reply_leaves_nothing_behind(
    host: Host, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.manager(), host.holder() as client:
        kept = await store(client, "a", "r")
        empty = await client.reserve(1)
        before = await client.stat()
        stub = client._bond.stub
        real = getattr(stub, verb)

        async def lose(*args: Any, **kwargs: Any) -> Any:
            await real(*args, **kwargs)
            raise asyncio.CancelledError

        monkeypatch.setattr(stub, verb, lose)
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "Reserve": lambda: client.reserve(2),
            "LeasePrefix": lambda: client.lease_prefix([key_of("a")], [key_of("r")]),
            "Publish": lambda: client.publish([write(client, empty[0], "c")]),
        }
        with pytest.raises(asyncio.CancelledError):
            await calls[verb]()
        monkeypatch.setattr(stub, verb, real)
        await client.release(await client.reserve(1))
        after = await client.stat()
        assert after.free == before.free
        assert after.leased + after.writing == client.num_leases == 3
        assert await client.release([*kept, *empty]) == 0
        assert client.num_leases == 0
        assert (await client.stat()).leased == 0


async def test_calls_fail_at_once_while_the_manager_is_down(host: Host) -> None:
    clock = asyncio.get_running_loop().time
    async with host.manager() as manager, host.holder() as client:
        (ref,) = await store(client, "a")
        await manager.crash()
        for call in (client.reserve(1), client.lease_prefix([key_of("a")], [b""]), client.stat()):
            started = clock()
            with pytest.raises(DependencyError):
                await call
            assert clock() - started < 2.0
        assert client.view.matches(ref), "what is leased stays readable"
        assert client.num_leases == 1


async def test_restarted_manager_gets_the_account_of_its_holders(host: Host) -> None:
    lost: list[Reattached] = []
    async with host.manager() as manager, host.holder("b") as bob:
        async with host.holder("a", on_reattach=lost.append) as ann:
            refs = await store(ann, "x", "y")
            (empty,) = await ann.reserve(1)
            await manager.crash()
            assert await ann.release(refs[1:]) == 0, "told with the next announcement"
            assert ann.num_leases == 2
            async with host.manager():
                (mine,) = await bob.reserve(1)
                stat = await bob.stat()
                assert (stat.leased, stat.cached, stat.writing) == (0, 2, 2), "ann has not announced yet"
                with pytest.raises(CapacityError):
                    await bob.reserve(NUM_SLOTS - 3)
                assert await ann.publish([write(ann, empty, "z")]) == [empty]
                stat = await bob.stat()
                assert (stat.leased, stat.cached, stat.writing) == (2, 1, 1)
                assert all(bob.view.matches(ref) for ref in [*refs, empty])
                assert bytes(bob.view.payload(refs[0].arena_id)[:7]) == b"xxxxxxx"
                assert await bob.release([mine]) == 0
                await ann.release([refs[0], empty])
                assert ann.num_leases == 0
                assert (await bob.stat()).leased == 0
    assert lost == [], "nothing was lost"


async def test_idle_holder_announces_by_watching(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_INTERVAL_S", 0.02)
    async with host.manager() as manager, host.holder("a") as ann, host.holder("b") as bob:
        await store(ann, "x")
        watching = asyncio.create_task(ann.watch())
        await manager.crash()
        async with host.manager():
            await bob.attach()

            async def is_announced() -> bool:
                return (await bob.stat()).leased == 1

            await until(is_announced)
            watching.cancel()


async def test_new_arena_is_mapped_and_earlier_leases_are_reported(host: Host) -> None:
    reports: list[Reattached] = []
    async with host.holder_of_two_managers(reports.append) as (client, replace):
        refs = await store(client, "a", "b")
        old = client.view
        await replace()
        (new,) = await store(client, "a")
        assert client.view.uuid != old.uuid
        (report,) = reports
        assert sorted(report.void, key=lambda ref: ref.arena_id) == refs
        assert report.new_arena is client.view
        assert bytes(old.payload(refs[0].arena_id)[:7]) == b"aaaaaaa", "the old mapping stays readable"
        assert client.view.matches(new)
        assert not any(client.view.matches(ref) for ref in refs)
        assert client.num_leases == 1


async def test_publishing_slots_of_a_lost_arena_fails(host: Host) -> None:
    async with host.holder_of_two_managers(lambda _: None) as (client, replace):
        (ref,) = await client.reserve(1)
        record = write(client, ref, "a")
        await replace()
        with pytest.raises(DependencyError, match="lost"):
            await client.publish([record])


async def test_holder_that_can_not_change_over_is_told_to_restart(host: Host) -> None:
    async with host.holder_of_two_managers(None) as (client, replace):
        await store(client, "a")
        before = client.view.uuid
        await replace()
        for _ in range(2):
            with pytest.raises(DependencyError, match="restart"):
                await client.reserve(1)
        assert client.view.uuid == before, "its mapping is never swapped under its feet"


async def test_failed_start_leaves_nothing_behind(host: Host) -> None:
    settings = host.settings(tiers=("disk",))
    with pytest.raises(DependencyError, match="FOREPAGE_COLDPOOL__DISK_DIR"):
        await serve(settings, asyncio.Event(), host.telemetry)
    with pytest.raises(CapacityError, match="FOREPAGE_COLDPOOL__CAPACITY_BYTES"):
        await serve(
            host.settings(capacity_bytes=1 << 16 if SLOT_BYTES > 1 << 16 else 1 << 50),
            asyncio.Event(),
            host.telemetry,
        )
    assert list(host.folder.iterdir()) == []


async def test_second_manager_of_an_instance_is_refused(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        with pytest.raises(DependencyError, match="another cold pool manager"):
            await serve(host.settings(), asyncio.Event(), host.telemetry)
        await client.reserve(1)


async def test_clean_shutdown_leaves_nothing_behind(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        await store(client, "a")
    assert list(host.folder.iterdir()) == []


async def test_gate_lets_calls_together_and_one_alone() -> None:
    gate = CallGate()
    seen: list[str] = []
    first_may_end = asyncio.Event()

    async def call(name: str) -> None:
        async with gate.call():
            seen.append(name)
            await first_may_end.wait()

    async def alone() -> None:
        async with gate.alone():
            seen.append("alone")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call("one"))
        tasks.create_task(call("two"))
        await asyncio.sleep(0)
        waiting = tasks.create_task(alone())
        await asyncio.sleep(0)
        tasks.create_task(call("late"))
        gives_up = tasks.create_task(call("never"))
        await asyncio.sleep(0)
        gives_up.cancel()
        assert seen == ["one", "two"]
        first_may_end.set()
        await waiting
    assert seen == ["one", "two", "alone", "late"]
