"""Events reach their streams in order, with one wake-up for many, and tokens that wait go out together."""

import asyncio
import threading

import pytest

from forepage.rpc import worker_pb2 as pb
from forepage.worker.outbox import Events, Outbox, joined


def tokens(*ids: int) -> pb.GenerateEvent:
    return pb.GenerateEvent(tokens=pb.Tokens(token_ids=ids))


async def test_events_of_a_thread_arrive_in_order_and_wake_the_loop_once() -> None:
    loop = asyncio.get_running_loop()
    wakes = []
    inner = loop.call_soon_threadsafe
    loop.call_soon_threadsafe = lambda *args: wakes.append(inner(*args))  # type: ignore[method-assign,assignment]
    outbox, streams = Outbox(loop), [Events(), Events()]

    def say() -> None:
        for idx in range(6):
            outbox.put(streams[idx % 2], tokens(idx))

    thread = threading.Thread(target=say)
    thread.start()
    thread.join()  # the event loop could not run meanwhile
    loop.call_soon_threadsafe = inner  # type: ignore[method-assign]
    assert len(wakes) == 1
    got = [[(await stream.get()).tokens.token_ids[0] for _ in range(3)] for stream in streams]
    assert got == [[0, 2, 4], [1, 3, 5]]


async def test_what_waits_is_joined_and_the_end_stays_last() -> None:
    events = Events()
    for event in (tokens(2), tokens(3, 4), pb.GenerateEvent(finished=pb.Finished(completion_tokens=4))):
        events.put_nowait(event)
    out = joined(tokens(1), events)
    assert [event.WhichOneof("event") for event in out] == ["tokens", "finished"]
    assert list(out[0].tokens.token_ids) == [1, 2, 3, 4]
    assert joined(pb.GenerateEvent(started=pb.Started()), events)[0].HasField("started")


async def test_log_probabilities_stay_with_their_tokens() -> None:
    events = Events()
    for idx in (5, 6):
        event = tokens(idx)
        event.tokens.chosen.add(token_id=idx, logprob=-float(idx))
        event.tokens.top.add(token_id=idx + 1, logprob=-float(idx))
        events.put_nowait(event)
    (event,) = joined(await events.get(), events)
    assert [item.token_id for item in event.tokens.chosen] == list(event.tokens.token_ids) == [5, 6]
    assert [item.logprob for item in event.tokens.top] == pytest.approx([-5.0, -6.0])
