"""The index while the driver page-locks its arena, or refuses to: replies go on, and a stop is clean."""

import asyncio
import socket
from pathlib import Path

import pytest
import torch

from forepage.coldpool.arena import arena_path
from forepage.coldpool.records import SlotRef
from forepage.index import page_lock, server
from forepage.index.key_store import KeyStore
from forepage.rpc import index_pb2 as pb
from forepage.rpc.edge import is_serving
from forepage.settings import SEEDED_MODEL, ColdpoolSettings, IndexSettings, ModelSettings, Settings
from forepage.telemetry import Attr, MetricName
from rigs.fake_cuda import FakeRuntime
from rigs.index_stream import GEOMETRY, WAIT_S, Asker, asking, question, serving_index, until
from rigs.key_arena import KeyArena

CUDA = torch.device("cuda")
NUM_SLOTS = 6
NUM_PIECES = 3


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    monkeypatch.setattr(page_lock, "CHUNK_BYTES", GEOMETRY.slot_bytes * NUM_SLOTS // NUM_PIECES)
    monkeypatch.setattr(page_lock, "RETRY_S", 0.01)
    return FakeRuntime.install(monkeypatch)


def arena_at(path: Path, seed: int = 0) -> tuple[KeyArena, list[SlotRef]]:
    made = KeyArena.create(path, num_slots=NUM_SLOTS, seed=seed)
    return made, [made.complete(slot) for slot in range(NUM_SLOTS)]


async def answered(asker: Asker, refs: list[SlotRef], *, first_id: int) -> pb.LookaheadReply:
    """The first reply that is no refusal."""
    async with asyncio.timeout(WAIT_S):
        while (reply := await asker.ask(question(first_id, refs))).error_code == "dependency_unavailable":
            first_id += 1
            await asyncio.sleep(0.005)
    return reply


async def test_questions_are_refused_at_once_while_the_driver_page_locks(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    runtime.go_on.clear()
    made, refs = arena_at(tmp_path / "arena")
    async with serving_index(made.arena.path, keys_device=CUDA) as index, asking(index.address) as asker:
        async with asyncio.timeout(WAIT_S / 2):  # the driver holds its caller twice as long
            for request_id in range(3):
                reply = await asker.ask(question(request_id, refs))
                assert reply.error_code == "dependency_unavailable"
                assert "page-locked" in reply.error_message
        assert runtime.sizes == []
        runtime.go_on.set()
        reply = await answered(asker, refs, first_id=10)
        assert (reply.error_code, reply.plan.num_scored) == ("", NUM_SLOTS)
        refused = {
            point.attributes[Attr.OUTCOME]: point.count for point in index.metric(MetricName.INDEX_LATENCY)
        }
        assert refused["dependency_unavailable"] >= 3
    assert len(runtime.sizes) == NUM_PIECES


async def test_a_new_arena_is_page_locked_beside_work_on_the_old_one(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    """The same slots and generations mean other records there: the old mapping answers nobody any more."""
    path = tmp_path / "arena"
    _, refs = arena_at(path, seed=1)
    async with serving_index(path, keys_device=CUDA) as index, asking(index.address) as asker:
        before = await answered(asker, refs, first_id=1)
        await asker.send(question(100, refs, sequence="held"))
        await until(lambda: index.planner.num_started > index.planner.num_ended)
        old_pieces = set(runtime.registered)
        runtime.go_on.clear()
        arena_at(path, seed=2)
        reply = await asker.ask(question(101, refs))
        assert "page-locked" in reply.error_message
        runtime.go_on.set()
        after = await answered(asker, refs, first_id=200)
        assert list(after.plan.score) != list(before.plan.score)
        assert old_pieces <= runtime.registered  # somebody still reads them
        index.planner.release.set()
        assert list((await asker.reply(100)).plan.score) == list(before.plan.score)
        await until(lambda: not old_pieces & runtime.registered)
        assert len(runtime.registered) == NUM_PIECES


async def test_a_refusal_gives_every_piece_back_and_is_tried_again(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    runtime.refuse_from = 2
    made, refs = arena_at(tmp_path / "arena")
    async with serving_index(made.arena.path, keys_device=CUDA) as index, asking(index.address) as asker:
        await asker.ask(question(1, refs))
        await until(lambda: len(runtime.unregistered) >= 2)
        reply = await asker.ask(question(2, refs))
        assert reply.error_code == "dependency_unavailable"
        assert "memlock" in reply.error_message
        runtime.refuse_from = None
        assert (await answered(asker, refs, first_id=10)).error_code == ""
        assert len(runtime.registered) == NUM_PIECES


async def test_a_driver_that_fails_otherwise_is_a_refusal_too(
    tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> int:
        raise RuntimeError("no CUDA-capable device is detected")

    monkeypatch.setattr(runtime, "cudaHostRegister", broken)
    made, refs = arena_at(tmp_path / "arena")
    async with serving_index(made.arena.path, keys_device=CUDA) as index, asking(index.address) as asker:
        reply = await asker.ask(question(1, refs))
        async with asyncio.timeout(WAIT_S):
            while "no CUDA-capable device" not in reply.error_message:
                reply = await asker.ask(question(reply.request_id + 1, refs))
    assert reply.error_code == "dependency_unavailable"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of an index that scores on the CPU, over keys that are page-locked all the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(server, "KeyStore", lambda path, geometry, _: KeyStore(path, geometry, CUDA))
    return Settings(
        instance="test",
        index=IndexSettings(listen=f"127.0.0.1:{port}", device="cpu"),
        coldpool=ColdpoolSettings(shm_dir=tmp_path),
        model=ModelSettings(path=SEEDED_MODEL),
    )


async def until_health(settings: Settings, *, serving: bool) -> None:
    async with asyncio.timeout(WAIT_S):
        while await is_serving(settings.index.listen, None, timeout_s=1) is not serving:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_health_says_not_serving_while_an_arena_is_page_locked(
    tmp_path: Path, settings: Settings, runtime: FakeRuntime
) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(server.run(settings, stop))
    arena_at(arena_path(tmp_path, "test"), seed=1)
    await until_health(settings, serving=True)
    runtime.go_on.clear()
    arena_at(arena_path(tmp_path, "test"), seed=2)
    await until_health(settings, serving=False)
    runtime.go_on.set()
    await until_health(settings, serving=True)
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await running
    assert runtime.registered == set()


async def test_a_stop_while_page_locking_waits_for_one_piece_and_gives_it_back(
    tmp_path: Path, settings: Settings, runtime: FakeRuntime
) -> None:
    runtime.go_on.clear()
    arena_at(arena_path(tmp_path, "test"))
    stop = asyncio.Event()
    running = asyncio.create_task(server.run(settings, stop))
    await until(runtime.entered.is_set)
    stop.set()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), 0.5)
    runtime.go_on.set()
    async with asyncio.timeout(WAIT_S):
        await running
    assert len(runtime.sizes) == len(runtime.unregistered) == 1
