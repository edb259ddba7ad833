"""Admits a request that costs time before its body is read, and reads the body within its bound.

Slots come first, so that waiting bodies can't fill the memory; the slot is held until the answer is out.
"""

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forepage.errors import RequestError
from forepage.gateway.admission import Admission
from forepage.gateway.http_errors import BodyTooLargeError, ClientGoneError
from forepage.gateway.request_scope import request_scope
from forepage.telemetry import MetricName, Telemetry

BODY_TIMEOUT_S = 120.0


class AdmittedBodyMiddleware:
    """Guards the POST paths in `operations` (named in metrics) and `other_paths`; the rest passes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        admission: Admission,
        max_body_bytes: int,
        operations: Mapping[str, str],
        other_paths: frozenset[str],
        telemetry: Telemetry,
    ) -> None:
        self._app = app
        self._admission = admission
        self._max_bytes = max_body_bytes
        self._operations = operations
        self._paths = other_paths | operations.keys()
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: RateLimitError, DependencyError (draining), BodyTooLargeError, ClientGoneError."""
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or path not in self._paths:
            await self._app(scope, receive, send)
            return
        request_scope(scope).operation = self._operations.get(path)
        with self._admission.slot():
            self._telemetry.move(MetricName.REQUESTS_RUNNING, 1)
            try:
                body = await self._read(scope, receive)
                await self._app(scope, _replay(body, receive), send)
            finally:
                self._telemetry.move(MetricName.REQUESTS_RUNNING, -1)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        num_bytes, more = 0, True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client left before its request was complete")
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    num_bytes += len(chunk)
                    if num_bytes > self._max_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
        except TimeoutError as error:
            raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error
        return b"".join(chunks)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is over {self._max_bytes} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the whole body once, then what the server says (a disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
