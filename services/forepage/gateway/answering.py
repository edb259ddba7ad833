"""From started generations to HTTP: one JSON object or an event stream, and nothing for nobody.

A client that leaves cancels the calls on the worker at once, whether or not it was streaming.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
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
from forepage.gateway.logprobs import ScoredToken
from forepage.gateway.replies import ErrorReply, PromptTokensDetails, Usage
from forepage.gateway.request_scope import RequestScope
from forepage.gateway.residency_usage import usage_of_choices
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


async def all_or_first_error(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all at once. Raises: the first error, once the others have been cancelled.

    A single one begins at once, before anything else gets its turn.
    """
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(generations: Sequence[Generation]) -> Usage:
    """What a reply cost: the prompt is counted once, whatever the number of choices."""
    counts = [generation.counts for generation in generations]
    completion = sum(count.completion for count in counts)
    return Usage(
        prompt_tokens=counts[0].prompt,
        completion_tokens=completion,
        total_tokens=counts[0].prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts[0].cached),
        forepage=usage_of_choices([generation.residency for generation in generations]),
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerStream(EventSourceResponse):
    """The event stream of one reply."""

    def __init__(
        self,
        generations: Sequence[Generation],
        shape: AnswerShape,
        scope: RequestScope,
        *,
        with_usage: bool,
    ) -> None:
        super().__init__(
            _events(generations, shape, scope, with_usage=with_usage),
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
    generations: Sequence[Generation], shape: AnswerShape, scope: RequestScope, *, with_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    """Chunks, then [DONE]. An error is the last event: [DONE] would call the answer complete."""

    def event(chunk: BaseModel) -> ServerSentEvent:
        data = chunk.model_dump_json(exclude=None if with_usage else {"usage"})
        return ServerSentEvent(data=data, sep=LINE_END)

    try:
        chunks = [_chunks(index, generation, shape) for index, generation in enumerate(generations)]
        async for chunk in interleaved(chunks):
            yield event(chunk)
        if with_usage:
            yield event(shape.usage(usage_of(generations)))
        yield ServerSentEvent(data="[DONE]", sep=LINE_END)
    except ForepageError as error:
        scope.error = error
        yield _error_event(error, scope.request_id)
    except Exception as error:
        scope.error = error
        structlog.get_logger("forepage.gateway").exception("stream failed", request_id=scope.request_id)
        yield _error_event(ForepageError("internal error"), scope.request_id)
    finally:
        if not all(generation.done for generation in generations) and scope.error is None:
            scope.error = ClientGoneError("the client closed its connection")


async def _chunks(index: int, generation: Generation, shape: AnswerShape) -> AsyncIterator[BaseModel]:
    """One choice; log-probabilities come with the first chunk behind their tokens."""
    opening = shape.opening(index)
    if opening is not None:
        yield opening
    tokens: list[ScoredToken] = []
    async for piece in generation.pieces():
        tokens += piece.tokens
        for delta in piece.deltas:
            yield shape.chunk(index, delta, tokens)
            tokens = []
    yield shape.closing(index, generation.finish_reason, tokens)


async def interleaved(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """Items of all streams as they come. Raises: the first error, once the others have been cancelled."""
    coming = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in coming if task in done]:
                stream = coming.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                coming[asyncio.ensure_future(anext(stream))] = stream
                yield item
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)


def _error_event(error: ForepageError, request_id: str) -> ServerSentEvent:
    reply = ErrorReply.model_validate(error_body(error, request_id))
    return ServerSentEvent(data=reply.model_dump_json(), sep=LINE_END)
