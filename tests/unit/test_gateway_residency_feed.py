"""The feed behind the page: what it says is what workers hold, watched once and only while somebody looks."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forepage.errors import RateLimitError
from forepage.gateway.api_keys import new_key
from forepage.gateway.dashboard import FEED_PATH
from forepage.gateway.residency_feed import (
    FRAME_S,
    MAX_WATCHING,
    MAX_WATCHING_OF_KEY,
    RETRY_AFTER_S,
    ResidencyFeed,
    live_worker,
)
from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import FakeWorker, StartWorker
from rigs.gateways import DEADLINE_S, OpenGateway, ServeGateway, bearer, key_file, until
from rigs.watching import blocks_of, resident_bits


def sequence(name: str = "a", *, held: tuple[int, ...] = (0, 2, 9), **fields: Any) -> pb.WatchedSequence:
    return pb.WatchedSequence(
        request_id=name,
        phase=pb.SEQUENCE_PHASE_DECODE,
        mode=pb.RESIDENCY_MODE_GUARDED,
        num_blocks=10,
        pinned_from=9,
        resident=resident_bits(held, 10),
        **fields,
    )


def shown_in(frame: dict[str, Any]) -> list[str]:
    return [one["request_id"] for worker in frame["workers"] for one in worker["sequences"]]


async def next_with(frames: AsyncIterator[dict[str, Any]], *names: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        async for frame in frames:
            if shown_in(frame) == list(names):
                return frame
    raise AssertionError("the feed ended")


def open_feed(directory: Any, *, is_closed: bool = False) -> ResidencyFeed:
    return ResidencyFeed(directory, is_closed=lambda: is_closed)


@given(blocks=st.sets(st.integers(0, 4_200)), extra=st.integers(0, 9))
def test_what_the_page_gets_names_just_the_resident_blocks(blocks: set[int], extra: int) -> None:
    """Read as the page reads it (logic.js, tested beside this): base64, a bit a block, the lowest first."""
    num_blocks = max(blocks, default=0) + 1 + extra
    view = pb.WatchedSequence(num_blocks=num_blocks, resident=resident_bits(blocks, num_blocks))
    (told,) = live_worker(pb.WatchFrame(sequences=[view]))["sequences"]
    again = pb.WatchedSequence(num_blocks=told["num_blocks"], resident=base64.b64decode(told["resident"]))
    assert blocks_of(again) == blocks


async def test_a_frame_says_what_every_worker_said(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    one, other = await start_worker(worker_id="a"), await start_worker(worker_id="b", running=3)
    one.show(sequence("x", missed_block_idx=[4], evidence_recall=0.5, prefetched_block_idx=[2]))
    gateway = await open_gateway(other, one)
    async with aclosing(open_feed(gateway.directory).frames()) as frames:
        async with asyncio.timeout(DEADLINE_S):
            async for frame in frames:
                if len(frame["workers"]) == 2:
                    break
    first, second = frame["workers"]
    assert (first["worker_id"], first["lost"], second["running"]) == ("a", None, 3)
    assert second["sequences"] == []
    (told,) = first["sequences"]
    assert (told["phase"], told["mode"]) == ("decode", "guarded")
    assert (told["missed_block_idx"], told["prefetched_block_idx"]) == ([4], [2])
    assert told["evidence_recall"] == pytest.approx(0.5)
    assert told["kv_footprint"] is None
    assert frame["block_tokens"] == 256
    json.dumps(frame, allow_nan=False)


async def test_a_worker_is_watched_once_for_all_and_not_at_all_for_nobody(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    feed = open_feed(gateway.directory)
    await asyncio.sleep(0)
    assert (worker.watched, feed.num_readers) == (0, 0)
    worker.show(sequence("x"))
    async with aclosing(feed.frames()) as one, aclosing(feed.frames()) as other:
        await next_with(one, "x")
        await next_with(other, "x")
        assert (worker.watching, worker.watched, feed.num_readers) == (1, 1, 2)
    await until(lambda: worker.watching == 0)
    assert feed.num_readers == 0
    worker.show()
    async with aclosing(feed.frames()) as frames:  # no memory of what was seen before
        assert (await anext(frames))["workers"] == []
        await until(lambda: worker.watched == 2)


async def test_a_slow_reader_gets_the_newest_and_nobody_more_than_five_a_second(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    seen: list[float] = []

    async def change() -> None:
        for number in range(200):
            worker.show(sequence(str(number)))
            await asyncio.sleep(0.005)

    async with aclosing(open_feed(gateway.directory).frames()) as frames:
        changing = asyncio.create_task(change())
        async for frame in frames:
            seen.append(time.monotonic())
            if shown_in(frame) == ["199"]:
                break
        await changing
    assert 3 <= len(seen) <= 10
    assert all(later - earlier >= 0.95 * FRAME_S for earlier, later in pairwise(seen))


async def test_a_lost_worker_is_said_to_be_lost_and_comes_back(
    start_worker: StartWorker, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forepage.gateway.residency_feed.LOOK_AGAIN_S", 0.05)
    worker = await start_worker(worker_id="w")
    port = int(worker.address.rpartition(":")[2])
    gateway = await open_gateway(worker)
    worker.show(sequence("x"))
    async with aclosing(open_feed(gateway.directory).frames()) as frames:
        await next_with(frames, "x")
        await worker.stop()
        lost = await next_with(frames)
        assert lost["workers"][0]["worker_id"] == "w"
        assert "w" in lost["workers"][0]["lost"]
        again = FakeWorker(worker_id="w")
        await again.start(port)
        again.show(sequence("y"))
        assert (await next_with(frames, "y"))["workers"][0]["lost"] is None
        await again.stop()


async def test_a_worker_that_is_listed_no_more_leaves_the_picture(
    start_worker: StartWorker, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forepage.gateway.residency_feed.LOOK_AGAIN_S", 0.05)
    worker = await start_worker()
    worker.show(sequence("x"))
    gateway = await open_gateway(worker)
    async with aclosing(open_feed(gateway.directory).frames()) as frames:
        await next_with(frames, "x")
        gateway.directory.listed()[0].wanted = False
        frame = await next_with(frames)
        assert (frame["workers"], frame["num_listed"]) == ([], 0)
        await until(lambda: worker.watching == 0)


async def test_one_reader_too_many_is_refused_and_leaves_nothing(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    feed = open_feed(gateway.directory)
    readers = [feed.frames() for _ in range(MAX_WATCHING)]
    for reader in readers:
        await anext(reader)
    with pytest.raises(RateLimitError):
        await anext(feed.frames())
    for reader in readers:
        await reader.aclose()
    assert feed.num_readers == 0
    async with aclosing(feed.frames()) as again:
        await anext(again)


async def test_one_key_cannot_take_the_places_of_the_others(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    feed = open_feed(gateway.directory)
    readers = [feed.frames("t", "greedy") for _ in range(MAX_WATCHING_OF_KEY)]
    for reader in readers:
        await anext(reader)
    with pytest.raises(RateLimitError, match="this key") as refused:
        await anext(feed.frames("t", "greedy"))
    assert refused.value.retry_after_s == RETRY_AFTER_S
    async with aclosing(feed.frames("t", "modest")) as other:  # of the same tenant
        await anext(other)
    await readers.pop().aclose()
    async with aclosing(feed.frames("t", "greedy")) as again:
        await anext(again)
    for reader in readers:
        await reader.aclose()
    assert feed.num_readers == 0


async def test_over_http_a_key_that_watches_too_much_is_told_when_to_come_back(
    start_worker: StartWorker, serve_gateway: ServeGateway, tmp_path: Path
) -> None:
    (greedy, kept_greedy), (modest, kept_modest) = new_key("greedy"), new_key("modest")
    keys = key_file(tmp_path, kept_greedy, kept_modest)
    gateway = await serve_gateway(await start_worker(), api_keys=keys)
    async with (
        asyncio.timeout(DEADLINE_S),
        httpx.AsyncClient(base_url=gateway.url) as client,
        AsyncExitStack() as watching,
    ):
        asks = [client.build_request("GET", FEED_PATH, headers=bearer(greedy)) for _ in range(12)]
        replies = await asyncio.gather(*(client.send(ask, stream=True) for ask in asks))
        for reply in replies:
            watching.push_async_callback(reply.aclose)
        refused = [reply for reply in replies if reply.status_code != 200]
        assert len(refused) == len(asks) - MAX_WATCHING_OF_KEY, "also those that come at once"
        for reply in refused:
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "10")
            assert json.loads(await reply.aread())["error"]["code"] == "rate_limit_exceeded"
        async with client.stream("GET", FEED_PATH, headers=bearer(modest)) as other:
            assert other.status_code == 200


async def test_over_http_frames_come_as_events_and_end_with_the_gateway(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker()
    worker.show(sequence("x"))
    gateway = await serve_gateway(worker)
    async with (
        asyncio.timeout(DEADLINE_S),
        httpx.AsyncClient(base_url=gateway.url) as client,
        client.stream("GET", FEED_PATH) as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        shown: list[list[str]] = []
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                shown.append(shown_in(json.loads(line.removeprefix("data: "))))
            if shown and shown[-1] == ["x"]:
                gateway.stop.set()
    await until(lambda: worker.watching == 0)


async def test_a_page_that_closes_ends_the_watch(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker()
    gateway = await serve_gateway(worker)
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        async with client.stream("GET", FEED_PATH) as reply:
            await until(lambda: worker.watching == 1)
            assert reply.status_code == 200
        await until(lambda: worker.watching == 0)
