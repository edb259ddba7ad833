"""What the loop says to callers, handed over to the event loop: one wake-up for all that a step gave.

A stream that is slower than the steps finds several tokens waiting, and sends them in one message.
"""

import asyncio
import contextlib
import threading

from forepage.rpc import worker_pb2 as pb

Events = asyncio.Queue[pb.GenerateEvent]


class Outbox:
    """Used by the loop's thread; delivers on the event loop it was made for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._undelivered: list[tuple[Events, pb.GenerateEvent]] = []

    def put(self, events: Events, event: pb.GenerateEvent) -> None:
        """Deliver soon, in order (any thread). Once the event loop is closed nobody listens."""
        with self._lock:
            self._undelivered.append((events, event))
            is_awake = len(self._undelivered) > 1
        if not is_awake:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            undelivered, self._undelivered = self._undelivered, []
        for events, event in undelivered:
            events.put_nowait(event)


def joined(event: pb.GenerateEvent, events: Events) -> list[pb.GenerateEvent]:
    """The event and those that wait behind it, tokens that follow tokens in one: nothing waits for this."""
    out = [event]
    while not events.empty():
        following = events.get_nowait()
        if following.HasField("tokens") and out[-1].HasField("tokens"):
            out[-1].tokens.MergeFrom(following.tokens)
        else:
            out.append(following)
    return out
