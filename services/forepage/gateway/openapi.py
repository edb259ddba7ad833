"""What the OpenAPI document says of answers beside their bodies: errors, headers, events, and the API key.

`routes` declares every answer with it; the tests hold the app to that.
"""

from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer

from forepage.gateway.replies import ErrorReply

Responses = dict[int | str, dict[str, Any]]

TOKENIZER_ERRORS = (400, 401, 404, 413, 429, 503)
GENERATION_ERRORS = (*TOKENIZER_ERRORS, 500, 504)
KEYED = [
    Depends(
        HTTPBearer(
            auto_error=False,  # `KeyMiddleware` asks; this only says so
            scheme_name="ApiKey",
            bearerFormat="fp-...",
            description="asked for where FOREPAGE_GATEWAY__API_KEYS names a file of keys",
        )
    )
]
"""Dependencies of a route that needs a key."""
_REQUEST_ID = {
    "x-request-id": {
        "description": "the client's own if it sent one, else made here; in logs and traces",
        "required": True,
        "schema": {"type": "string"},
    }
}
_RETRY_AFTER = {
    "retry-after": {
        "description": "seconds to wait before trying again",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
_REASONS = {
    400: "a field is wrong: `error.param` names it; or prompt and answer don't fit the context",
    401: "no API key, or one that is not known",
    404: "no worker serves this model",
    413: "the body is over `gateway.max_body_bytes`",
    429: "over a limit of the API key, of this gateway, or of the worker's queue",
    500: "a fault of ours",
    503: "no worker can be reached, none has room, or the gateway is draining",
    504: "the deadline passed",
}
_RETRIED = (429, 503)
_EVENT = {
    "type": "object",
    "description": "one event of the stream that `stream: true` gives",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON: a piece of the answer, or an error, which is the last; else [DONE] is",
        }
    },
}


def errors(*statuses: int) -> Responses:
    """These errors, with why they come."""
    return {
        status: {
            "model": ErrorReply,
            "description": _REASONS[status],
            "headers": _REQUEST_ID | (_RETRY_AFTER if status in _RETRIED else {}),
        }
        for status in statuses
    }


def every() -> Responses:
    """What every route answers."""
    other = {"model": ErrorReply, "description": "any other error", "headers": _REQUEST_ID}
    return {200: {"headers": _REQUEST_ID}, "default": other}


def generated(model: type[Any]) -> Responses:
    """A generation: `model`, or events."""
    whole = {"model": model, "content": {"text/event-stream": {"schema": _EVENT}}, "headers": _REQUEST_ID}
    return {200: whole, **errors(*GENERATION_ERRORS)}
