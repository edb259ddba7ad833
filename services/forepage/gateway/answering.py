"""From a started generation to HTTP: one JSON object or an event stream, and nothing for nobody.

A client that leaves cancels the call on the worker at once, whether or not it was streaming.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from forepage.errors import ForepageError
from forepage.gateway.generation import Generation
from forepage.gateway.http_errors import ClientGoneError, error_body
from forepage.gateway.replies import ErrorReply, usage_of
from forepage.gateway.request_scope import RequestScope
from forepage.gateway.shapes import AnswerShape

PING_S = 15
"""A comment line this often keeps proxies from closing a stream during a long prefill."""
SEND_TIMEOUT_S = 60.0
"""A client that takes nothing for this long, with every buffer on the way full, is gone."""
LINE_END = "\n"

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises: ClientGoneError, with `work` cancelled, when the client leaves first.

    Nothing else may read from `request` meanwhile.
    """
    answer = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientGoneError("the client closed its connection")
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerStream(EventSourceResponse):
    """The event stream of one answer."""

    def __init__(
        self, generation: Generation, shape: AnswerShape, scope: RequestScope, *, with_usage: bool
    ) -> None:
        super().__init__(
            _events(generation, shape, scope, with_usage=with_usage),
            ping=PING_S,
            sep=LINE_END,
            send_timeout=SEND_TIMEOUT_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: ClientGoneError when the client stops reading."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError as error:
            raise ClientGoneError("the client stopped reading") from error


async def _events(
    generation: Generation, shape: AnswerShape, scope: RequestScope, *, with_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    """Chunks, then [DONE]. An error is the last event: [DONE] would call the answer complete."""

    def event(chunk: BaseModel) -> ServerSentEvent:
        data = chunk.model_dump_json(exclude=None if with_usage else {"usage"})
        return ServerSentEvent(data=data, sep=LINE_END)

    try:
        opening = shape.opening()
        if opening is not None:
            yield event(opening)
        async for piece in generation.text():
            yield event(shape.chunk(piece))
        yield event(shape.chunk(None, generation.finish_reason))
        if with_usage:
            yield event(shape.usage(usage_of(generation.counts, generation.residency)))
        yield ServerSentEvent(data="[DONE]", sep=LINE_END)
    except ForepageError as error:
        scope.error = error
        yield _error_event(error)
    except Exception as error:
        scope.error = error
        structlog.get_logger("forepage.gateway").exception("stream failed", request_id=scope.request_id)
        yield _error_event(ForepageError("internal error"))
    finally:
        if not generation.done and scope.error is None:
            scope.error = ClientGoneError("the client closed its connection")


def _error_event(error: ForepageError) -> ServerSentEvent:
    return ServerSentEvent(data=ErrorReply.model_validate(error_body(error)).model_dump_json(), sep=LINE_END)
