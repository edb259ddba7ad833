"""Client and server in one process, over a Unix socket: the RPCs, their errors, spans, and lost replies."""

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import SpanKind
from structlog.testing import capture_logs

from forepage.coldpool import attachment
from forepage.coldpool import client as client_module
from forepage.coldpool.client import ColdPoolClient, SlotRef
from forepage.coldpool.records import LAYOUT_VERSION, payload_checksum
from forepage.errors import CapacityError, DependencyError, IntegrityError, ModelFormatError, RequestError
from forepage.kv.ids import ArenaId
from forepage.rpc import coldpool_pb2 as pb
from forepage.rpc.edge import serving
from forepage.telemetry import SpanName
from rigs.coldpool_host import NUM_SLOTS, SLOT_BYTES, Host, key_of, store, write


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="fp-") as folder:
        yield Host(Path(folder))


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


async def test_arena_of_another_layout_is_refused_by_name(host: Host) -> None:
    """A manager of another release: no lease of it means here what it means there."""
    async with host.manager(), host.holder("before") as before:
        shape = before.view.shape.encode()
        other = shape[:8] + (LAYOUT_VERSION + 1).to_bytes(4, "little") + shape[12:-8]
        with before.arena_path.open("r+b") as file:
            file.write(other + payload_checksum(other).to_bytes(8, "little"))
        with pytest.raises(IntegrityError, match="layout version 2, this program reads 1"):
            async with host.holder():
                pass


async def test_manager_of_another_protocol_is_refused_by_name(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ATTACH_TIMEOUT_S", 0.0)
    async with serving(host.address, lambda _: None, tls=None, drain_s=0.0):
        with pytest.raises(DependencyError, match="cold pool: unimplemented"):
            async with host.holder():
                pass


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
    async with host.manager(), host.holder("w0"):
        monkeypatch.setattr(client_module, "ATTACH_TIMEOUT_S", 0.0)
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


FAR = pb.SlotRef(arena_id=NUM_SLOTS, generation=1)
NEAR = pb.SlotRef(arena_id=1, generation=1)
WRONG_REPLIES: dict[str, tuple[str, Any]] = {
    "reserved too few": ("Reserve", pb.ReserveReply(slots=[NEAR])),
    "reserved beyond the arena": ("Reserve", pb.ReserveReply(slots=[NEAR, FAR])),
    "published too many": ("Publish", pb.PublishReply(slots=[NEAR, NEAR])),
    "published beyond the arena": ("Publish", pb.PublishReply(slots=[FAR])),
    "leased more than asked": ("LeasePrefix", pb.LeasePrefixReply(num_blocks=2, blocks=[NEAR, NEAR])),
    "leased without state": ("LeasePrefix", pb.LeasePrefixReply(num_blocks=1, blocks=[NEAR])),
    "leased beyond the arena": (
        "LeasePrefix",
        pb.LeasePrefixReply(num_blocks=1, blocks=[FAR], resume_parts=[NEAR]),
    ),
}


@pytest.mark.parametrize(("verb", "reply"), WRONG_REPLIES.values(), ids=WRONG_REPLIES)
async def test_reply_that_does_not_fit_is_refused_and_the_account_made_anew(
    host: Host, verb: str, reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.manager(), host.holder() as client:
        (empty,) = await client.reserve(1)
        real = getattr(client._bond.stub, verb)

        async def answer_wrongly(*args: Any, **kwargs: Any) -> Any:
            await real(*args, **kwargs)
            return reply

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "Reserve": lambda: client.reserve(2),
            "Publish": lambda: client.publish([write(client, empty, "a")]),
            "LeasePrefix": lambda: client.lease_prefix([key_of("a")], [key_of("r")]),
        }
        with monkeypatch.context() as patch:
            patch.setattr(client._bond.stub, verb, answer_wrongly)
            with pytest.raises(IntegrityError, match="cold pool: its reply has"):
                await calls[verb]()
        assert client.num_leases == 1
        assert await client.publish([write(client, empty, "a")]) == [empty]
        stat = await client.stat()
        assert (stat.leased, stat.writing) == (1, 0)


async def test_a_release_that_breaks_is_told_later_and_logged(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker does not wait for it: what broke would be seen by nobody, and the slots be lost."""

    async def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no memory to map an arena")

    async with host.manager(), host.holder() as client:
        refs = await store(client, "x")
        stub = client._bond.stub
        real = stub.Release
        monkeypatch.setattr(stub, "Release", broken)
        with capture_logs() as logs:
            assert await client.release(refs) == 0
        monkeypatch.setattr(stub, "Release", real)
        (said,) = [line for line in logs if line["event"] == "release_deferred"]
        assert isinstance(said["exc_info"], OSError)
        assert host.counted("forepage.fallbacks")["coldpool_release_deferred"] == 1
        await client.reserve(1)  # announces first
        assert (await client.stat()).leased == 0


async def test_lease_given_back_twice_is_counted_and_takes_nothing(host: Host) -> None:
    async with host.manager(), host.holder("a") as ann, host.holder("b") as bob:
        (ref,) = await store(ann, "x")
        assert await store(bob, "x") == [ref]
        assert await ann.release([ref]) == 0
        assert await ann.release([ref, SlotRef(ArenaId(5), 1)]) == 2
        assert (await bob.stat()).leased == 1
        assert host.counted("forepage.fallbacks") == {"coldpool_stale_ref": 2}


@pytest.mark.parametrize("seed", range(2))
async def test_soak_of_cancelled_calls_returns_to_the_baseline(host: Host, seed: int) -> None:
    """Peers leaked a block a request for want of such a test: hundreds of calls, many cut off midway."""
    rng = random.Random(seed)
    num_leased = 0
    tiers = {"tiers": ("disk",), "disk_dir": host.folder / "disk", "disk_bytes": 40 << 10}

    async def work(client: ColdPoolClient) -> None:
        nonlocal num_leased
        name, resume = f"b{rng.randrange(5)}", f"r{rng.randrange(5)}"
        refs: list[SlotRef] = []
        try:
            async with asyncio.timeout(rng.choice([0.001, 0.003, 0.01, 5])):
                refs += await store(client, name, resume)
                lease = await client.lease_prefix([key_of(name)], [key_of(resume)])
                refs += [*lease.blocks, *lease.resume_parts]
                num_leased += lease.num_blocks
                for ref in lease.blocks:
                    assert bytes(client.view.payload(ref.arena_id)[:14]) == name.encode() * 7
        except (CapacityError, TimeoutError):
            await client.attach()  # only a call cut off in `store` leaves slots that nobody names
        await client.release(refs)

    async with host.manager(verify="always", **tiers), host.holder("a") as ann, host.holder("b") as bob:
        for _ in range(30):
            await asyncio.gather(*(work(client) for client in (ann, bob, ann, bob)))
            for client in (ann, bob):
                await client.release(list(client._bond.leases.elements()))
                assert client.num_leases == 0
        stat = await ann.stat()
        assert (stat.leased, stat.writing, stat.damaged) == (0, 0, 0)
        assert stat.free + stat.cached == stat.total == NUM_SLOTS
        assert num_leased > 10
