"""The page at `/`: what is resident, live, and a box to ask; its files, its feed, its passages.

The files are public, as they hold nothing: where API keys are configured the page asks for one. What it shows
comes from two endpoints that need it, and is of the key's tenant alone.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from forepage.gateway.chat_schemas import ChatBody
from forepage.gateway.passages import Passages, passages
from forepage.gateway.request_scope import request_scope
from forepage.gateway.residency_feed import BLOCK_TOKENS, Frame, ResidencyFeed
from forepage.gateway.start import Starter

FEED_PATH, PASSAGES_PATH = "/dashboard/feed", "/dashboard/passages"
FOLDER = Path(__file__).parent
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {
    "/" if path.suffix == ".html" else f"/dashboard/{path.name}": path
    for path in sorted(FOLDER.iterdir())
    if path.suffix in MEDIA_TYPES
}
"""By the path that serves them."""
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PING_S = 15
SEND_TIMEOUT_S = 20.0
"""A page that takes nothing for this long is gone."""
LINE_END = "\n"


def make_dashboard(feed: ResidencyFeed, starter: Starter) -> APIRouter:
    """Every route of the page. None is part of the API: the schema does not list them."""
    router = APIRouter(include_in_schema=False)
    for url, path in FILES.items():
        router.add_api_route(url, _file(path), methods=["GET"])

    @router.get(FEED_PATH)
    async def watch(request: Request) -> EventSourceResponse:
        """Snapshots of what is resident, as events; its place is taken, or refused, before it begins."""
        ours = request_scope(request.scope)
        frames = feed.frames(ours.tenant, ours.key_name)
        ours.stack.push_async_callback(frames.aclose)
        first = await anext(frames, None)
        return EventSourceResponse(
            _events(first, frames),
            ping=PING_S,
            sep=LINE_END,
            send_timeout=SEND_TIMEOUT_S,
            headers={"cache-control": "no-store", "x-content-type-options": "nosniff"},
        )

    @router.post(PASSAGES_PATH)
    async def passages_of(body: ChatBody) -> Passages:
        """Where the blocks of this conversation's prompt lie in its last message."""

        def measure() -> Passages:
            text = "".join(body.messages[-1].texts or ())
            return passages(starter.layout(body), text, starter.tokenizer, block_tokens=BLOCK_TOKENS)

        return await asyncio.to_thread(measure)

    return router


async def _events(first: Frame | None, rest: AsyncIterator[Frame]) -> AsyncIterator[ServerSentEvent]:
    if first is not None:
        yield _event(first)
    async for frame in rest:
        yield _event(frame)


def _event(frame: Frame) -> ServerSentEvent:
    return ServerSentEvent(data=json.dumps(frame, separators=(",", ":")), sep=LINE_END)


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = PAGE_HEADERS | {"etag": etag, "content-type": MEDIA_TYPES[path.suffix]}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return file
