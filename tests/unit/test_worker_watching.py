"""Who watches a worker sees its resident sets as they are, and costs nothing while he does not look."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise

import grpc
import numpy as np
import pytest
import torch

from forepage.errors import CapacityError
from forepage.frames import WorkerFrame
from forepage.model.indexer import IndexerTap
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc as rpc
from forepage.rpc.edge import error_of_call
from forepage.settings import ResidencyMode
from forepage.worker import servicer, watching
from forepage.worker.copy_engine import BlockStore
from forepage.worker.reads import Reads
from forepage.worker.sequence import Phase
from forepage.worker.servicer import MAX_WATCHING, DecodeWorker
from forepage.worker.watching import view_of
from rigs.gateways import until
from rigs.watching import blocks_of
from rigs.worker import WorkerRig, plan_reply, text_tokens, wants, worker_rig

PROMPT = text_tokens(2_100)
LOOKAHEAD, GUARDED = ResidencyMode.LOOKAHEAD, ResidencyMode.GUARDED
CARD = WorkerFrame("w", "h:1", "model", "fp", 4096, draining=False)


@pytest.fixture
def rig() -> Iterator[WorkerRig]:
    with worker_rig() as opened:
        yield opened


@asynccontextmanager
async def watched(rig: WorkerRig) -> AsyncIterator[tuple[rpc.DecodeWorkerStub, DecodeWorker]]:
    """The worker's own servicer over gRPC; the rig's loop runs on its thread."""
    edge = DecodeWorker(rig.loop, rig.parts, CARD, None, None, eos=0)  # type: ignore[arg-type]  # nobody generates
    server = grpc.aio.server()
    rpc.add_DecodeWorkerServicer_to_server(edge, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    rig.loop.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.DecodeWorkerStub(channel), edge
    edge.draining = True
    await asyncio.to_thread(rig.loop.stop, 10.0)
    await server.stop(10.0)


def test_a_view_follows_the_resident_set_through_a_sequences_life(
    rig: WorkerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = rig.parts.device.store

    def copied_at_once(stores: Seq[BlockStore]) -> Future[list[int]]:
        copied = copy(stores)
        wait([copied])  # copies are another thread's: how many turns they take is not this test's matter
        return copied

    monkeypatch.setattr(rig.parts.device, "store", copied_at_once)
    phases: set[int] = set()
    stored: list[int] = []
    rig.index.auto = wants(1, 3)
    running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40)

    def looked() -> bool:
        view, sequence = view_of(running.sequence), running.sequence
        phases.add(view.phase)
        held = sequence.resident if sequence.device is not None else None
        assert blocks_of(view) == (set(held.row_id_by_block) if held else set())
        assert view.pinned_from == (held.pinned_from if held else 0)
        assert view.processed_tokens == sequence.num_processed
        assert view.generated_tokens == len(running.tokens)
        stored.append(view.stored_blocks)
        return len(running.tokens) >= 30

    rig.run_until(looked)
    assert {pb.SEQUENCE_PHASE_WAITING, pb.SEQUENCE_PHASE_PREFILL, pb.SEQUENCE_PHASE_DECODE} <= phases
    assert blocks_of(view_of(running.sequence)) == {1, 3, *range(running.sequence.resident.pinned_from, 9)}
    assert stored == sorted(stored)
    assert set(stored) == {0, 2, 4, 6, 8}, "a chunk's blocks go to the cold pool when it is done"
    assert stored[-1] == 8
    rig.run(running)


def test_prefetched_are_the_blocks_of_the_newest_change(rig: WorkerRig) -> None:
    rig.index.auto = wants(1, 3)
    running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=100)
    rig.run_until(lambda: len(running.tokens) >= 2)
    assert list(view_of(running.sequence).prefetched_block_idx) == []  # kept from the prefill, not loaded
    rig.index.auto = wants(3, 5)
    rig.run_until(lambda: 5 in running.sequence.resident.row_id_by_block)
    assert list(view_of(running.sequence).prefetched_block_idx) == [5]
    assert view_of(running.sequence).prefetch_latency_ms > 0
    rig.index.auto = wants(5, 6)
    rig.run_until(lambda: 6 in running.sequence.resident.row_id_by_block)
    assert list(view_of(running.sequence).prefetched_block_idx) == [6]
    rig.run(running)


def test_missed_are_the_absent_blocks_of_the_newest_audit(rig: WorkerRig) -> None:
    rig.index.auto = lambda request: plan_reply(request, [1, 3], recall=0.5, missing=[5])
    running = rig.submit(PROMPT, mode=GUARDED, max_tokens=100)
    rig.run_until(lambda: running.sequence.report.escalations == 1)
    view = view_of(running.sequence)
    assert list(view.missed_block_idx) == [5]
    assert view.evidence_recall == pytest.approx(0.5)
    assert view.escalations == 1
    rig.index.auto = wants(1, 3)
    rig.run_until(lambda: view_of(running.sequence).evidence_recall == 1.0)
    assert list(view_of(running.sequence).missed_block_idx) == []
    rig.run(running)


def test_a_view_tells_nothing_of_the_text(rig: WorkerRig) -> None:
    """Two prompts of one length look alike; no field could carry a token or a word."""
    one, other = (rig.submit(text_tokens(600, seed), name="same") for seed in (1, 2))
    assert one.sequence.tokens != other.sequence.tokens
    assert view_of(one.sequence) == view_of(other.sequence)
    texts = {field.name for field in pb.WatchedSequence.DESCRIPTOR.fields if field.type == field.TYPE_STRING}
    assert texts == {"request_id"}
    rig.run(one, other)


def test_every_phase_of_a_live_sequence_has_a_name() -> None:
    assert set(watching.PROTO_OF_PHASE) == set(Phase) - {Phase.DONE}


async def test_watch_streams_snapshots_and_skips_equal_ones(rig: WorkerRig) -> None:
    async with watched(rig) as (stub, _):
        call = stub.Watch(pb.WatchRequest())
        first = await call.read()
        assert (first.worker.worker_id, len(first.sequences)) == ("w", 0)
        running = rig.submit(PROMPT, max_tokens=60, name="abc")
        seen: list[pb.WatchFrame] = []
        while not seen or seen[-1].sequences:
            seen.append(await asyncio.wait_for(call.read(), 20.0))
        assert running.finished is not None
        assert {view.request_id for frame in seen for view in frame.sequences} == {"abc"}
        assert all(one != two for one, two in pairwise(seen))
        told = len(seen)
        with suppress(TimeoutError):  # the worker may still give something back, then nothing comes
            while len(seen) < told + 5:
                seen.append(await asyncio.wait_for(call.read(), 1.0))
        assert len(seen) < told + 5
        assert all(one != two for one, two in pairwise(seen))


async def test_snapshots_are_at_least_a_fifth_of_a_second_apart(
    rig: WorkerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    give = watching.give_views

    def counted(*args: object) -> None:
        made.append(time.monotonic())
        give(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("forepage.worker.loop.give_views", counted)
    async with watched(rig) as (stub, _):
        running = rig.submit(PROMPT, max_tokens=100)
        call = stub.Watch(pb.WatchRequest(interval_ms=1))
        while running.finished is None:
            await asyncio.wait_for(call.read(), 20.0)
    assert len(made) > 1
    assert all(later - before >= servicer.WATCH_EVERY_S * 0.95 for before, later in pairwise(made))


async def test_nothing_is_made_while_nobody_watches(rig: WorkerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr("forepage.worker.loop.give_views", lambda *args: made.append(args))
    async with watched(rig) as (stub, edge):
        first = rig.submit(PROMPT, max_tokens=40)
        await until(lambda: first.finished is not None)
        assert made == []
        call = stub.Watch(pb.WatchRequest())
        await until(lambda: bool(made))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        await until(lambda: edge._num_watching == 0)
        made.clear()
        second = rig.submit(PROMPT, max_tokens=40)
        await until(lambda: second.finished is not None)
        assert made == []


async def test_too_many_who_watch_are_told_to_come_back(rig: WorkerRig) -> None:
    async with watched(rig) as (stub, _):
        calls = [stub.Watch(pb.WatchRequest()) for _ in range(MAX_WATCHING)]
        for call in calls:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Watch(pb.WatchRequest()).read()
        assert isinstance(error_of_call(refused.value, what="worker"), CapacityError)
        calls[0].cancel()
        async with asyncio.timeout(10.0):
            while True:
                try:
                    await stub.Watch(pb.WatchRequest()).read()
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)


async def test_a_view_that_cannot_be_made_does_not_stop_the_worker(
    rig: WorkerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(watching, "view_of", broken)
    async with watched(rig) as (stub, _):
        running = rig.submit(PROMPT, max_tokens=20)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Watch(pb.WatchRequest()).read()
        await until(lambda: running.is_over)
        assert running.finished is not None
    assert rig.loop.broken is None


def tap(entries: list[int], scores: list[float]) -> IndexerTap:
    width = 6
    padded = entries + [-1] * (width - len(entries))
    filled = scores + [float("-inf")] * (width - len(scores))
    return IndexerTap(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.tensor([padded]), torch.tensor([filled]))


def masses(reads: Reads) -> dict[int, float]:
    return {int(block): mass for block, mass in reads.mean_mass()}


def test_reads_are_the_mass_of_evidence_by_block() -> None:
    """Two layers: one wants entries 0 and 70 alike, the other entry 70 alone; entry 130 never counts."""
    reads = Reads()
    reads.add_step([tap([0, 70, 130], [9.0, 9.0, 0.0]), tap([70], [1.0])], 0)
    share = np.exp(9.0) / (2 * np.exp(9.0) + 1)
    assert masses(reads) == {0: pytest.approx(share / 2), 1: pytest.approx(share / 2 + 0.5)}
    assert reads.newest == {0, 1}
    reads.add_step([tap([], []), tap([130], [0.0])], 0)
    assert reads.newest == {2}
    assert masses(reads)[2] == pytest.approx(0.25)


def test_reads_are_reported_when_asked_in_every_mode(rig: WorkerRig) -> None:
    rig.index.auto = wants(1, 3)
    for mode in ResidencyMode:
        quiet = rig.submit(PROMPT, mode=mode, max_tokens=30, salt="q" + mode)
        rig.run(quiet)
        asked = replace(quiet.sequence.request, reads=True, cache_salt="a" + mode)
        loud = rig.submit_request(asked)
        rig.run(loud)
        assert loud.tokens == quiet.tokens
        assert list(quiet.report.read_block_idx) == []
        mass_by_block = dict(zip(loud.report.read_block_idx, loud.report.read_mass, strict=True))
        assert list(mass_by_block) == sorted(mass_by_block)
        assert mass_by_block
        assert sum(mass_by_block.values()) <= 1 + 1e-6
        if mode is LOOKAHEAD:  # what was absent can have been read by the prompt's last token alone
            absent = set(mass_by_block) - {1, 3, 7, 8}
            assert sum(mass_by_block[block] for block in absent) <= 1 / 30
    rig.check_baseline()
