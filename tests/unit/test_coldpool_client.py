"""Client and server in one process, over a Unix socket: the RPCs, their errors, spans, and lost replies."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
from forepage.coldpool.records import ArenaId, payload_checksum
from forepage.coldpool.server import read_geometry, serve
from forepage.errors import CapacityError, DependencyError, ForepageError, ModelFormatError, RequestError
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.edge import error_of_call, open_channel
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
    async def manager(self, **coldpool: Any) -> AsyncIterator[None]:
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(self.settings(**coldpool), stop, self.telemetry))
        try:
            yield
        finally:
            stop.set()
            await serving

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


@pytest.fixture
def host() -> Any:
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
        with pytest.raises(CapacityError) as full:
            await client.reserve(NUM_SLOTS), await client.reserve(1)
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


@pytest.mark.parametrize("holder_id", ["../../etc/x", "", "a b", "x" * 65, "nobody"])
async def test_holder_without_its_lock_is_refused(host: Host, holder_id: str) -> None:
    async with host.manager(), open_channel(host.address) as channel:
        stub = client_module.Attachment(
            host.address, pb.AttachRequest(), telemetry=host.telemetry, on_reattach=None
        ).stub
        del channel
        if not holder_id:
            reply = await stub.Attach(pb.AttachRequest(slot_bytes=SLOT_BYTES), timeout=5)
            assert reply.num_slots == NUM_SLOTS, "asking where the arena is needs no lock"
            return
        with pytest.raises(Exception) as caught:
            await stub.Attach(pb.AttachRequest(holder_id=holder_id, slot_bytes=SLOT_BYTES), timeout=5)
        error = error_of_call(caught.value, what="test")  # type: ignore[arg-type]
        assert isinstance(error, RequestError)
        assert error.param == "holder_id"


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
            with pytest.raises(CapacityError):
                await client.reserve(NUM_SLOTS, span=parent) and await client.reserve(1, span=parent)
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


async def test_manager_that_is_down_fails_calls_at_once_and_loses_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Reattached] = []
    async with host.holder_beyond_managers(reports) if False else _two_managers(host, reports) as client:
        refs = await store(client, "a", "b")
        await client.release(await client.reserve(1))
        await _Managers.of(client).stop_dirty()
        for call in (lambda: client.reserve(1), lambda: client.lease_prefix([key_of("a")], [b""])):
            started = asyncio.get_running_loop().time()
            with pytest.raises(DependencyError):
                await call()
            assert asyncio.get_running_loop().time() - started < 2.0
        assert await client.release(refs[1:]) == 0
        assert client.view.matches(refs[0])
