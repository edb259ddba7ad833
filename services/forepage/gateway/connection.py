"""One HTTP connection: uvicorn's, with a bound on what anybody may hold before a request of his has begun.

uvicorn waits for a request's head for ever and keeps whatever comes of it, and no API key is asked for before
the head is there. Bodies and answers have bounds of their own (admitted_body, answering).
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 20.0
"""From the connection, or from the first byte of a later request, to the end of the request's head."""
MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Closed when a head is late or too long; a head whose request is not answered yet is not waited for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """asyncio."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        super().data_received(data)
        if self._late is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The head of the request is over {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """The parser's: the first byte of a head."""
        super().on_message_begin()
        if self._late is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The parser's."""
        self._have_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _have_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _head_is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)
        else:
            self.transport.close()
