"""One stream to the lookahead index, kept open as long as the worker lives.

Questions never wait here: when the index is down they are refused at once and the caller falls back.
A stream that breaks reports every question it leaves open.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from forepage.rpc import index_pb2 as pb
from forepage.rpc import index_pb2_grpc as rpc
from forepage.rpc.edge import open_channel
from forepage.rpc.tls import MutualTls

RECONNECT_S = 0.2
MAX_RECONNECT_S = 1.0
MAX_OPEN = 512
"""Questions on the stream beyond which more are refused; those of one step are never told apart."""

OnReply = Callable[[pb.LookaheadReply], None]
OnDown = Callable[[], None]


class IndexClient:
    """Sends questions, hands replies to `on_reply`; `on_down` is called when the stream breaks."""

    def __init__(
        self, address: str, *, on_reply: OnReply, on_down: OnDown, tls: MutualTls | None = None
    ) -> None:
        """Callbacks run on the event loop's thread."""
        self._address = address
        self._tls = tls
        self._on_reply = on_reply
        self._on_down = on_down
        self._outbox: asyncio.Queue[pb.LookaheadRequest] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected = False
        self._open = 0
        self._log = structlog.get_logger("forepage.worker.index_client")

    @property
    def is_connected(self) -> bool:
        """Whether a question asked now would reach the index."""
        return self._connected

    def ask(self, request: pb.LookaheadRequest) -> bool:
        """Send from any thread; False (nothing sent) when the index is down or too far behind."""
        if not self._connected or self._loop is None or self._open >= MAX_OPEN:
            return False
        self._loop.call_soon_threadsafe(self._put, request)
        return True

    async def run(self) -> None:
        """Keep the stream up until cancelled."""
        self._loop = asyncio.get_running_loop()
        delay, is_told = RECONNECT_S, False
        async with open_channel(self._address, self._tls) as channel:
            while True:
                try:
                    await asyncio.wait_for(channel.channel_ready(), MAX_RECONNECT_S)
                    delay, is_told = RECONNECT_S, False
                    await self._stream(rpc.LookaheadIndexStub(channel))
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    if not is_told:  # once an outage
                        self._log.warning(
                            "lookahead index unreachable", address=self._address, why=_why(error)
                        )
                    is_told = True
                finally:
                    self._set_down()
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RECONNECT_S)

    async def _stream(self, stub: rpc.LookaheadIndexStub) -> None:
        self._outbox = asyncio.Queue()  # bounded by `ask`
        call = stub.Lookahead(self._requests(self._outbox))
        self._connected = True
        self._log.info("lookahead index connected", address=self._address)
        async for reply in call:
            self._open -= 1
            self._on_reply(reply)

    async def _requests(
        self, outbox: asyncio.Queue[pb.LookaheadRequest]
    ) -> AsyncIterator[pb.LookaheadRequest]:
        while True:
            yield await outbox.get()

    def _put(self, request: pb.LookaheadRequest) -> None:
        if self._connected:
            self._open += 1
            self._outbox.put_nowait(request)
        else:
            self._on_down()

    def _set_down(self) -> None:
        was_connected, self._connected, self._open = self._connected, False, 0
        if was_connected:
            self._on_down()


def _why(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else "no answer"
