"""Errors as HTTP: OpenAI's {"error": {message, type, param, code}} and our request_id, and Retry-After.

Every error of ours leaves through `error_response`, or through `error_body` inside a running stream.
No message repeats what a client sent: bodies are prompts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from forepage.errors import (
    AuthenticationError,
    CapacityError,
    DependencyError,
    ForepageError,
    RateLimitError,
    RequestError,
)

DEFAULT_RETRY_AFTER_S = 1.0


class BodyTooLargeError(RequestError):
    """The request body is over `gateway.max_body_bytes`."""

    code = "request_too_large"
    http_status = 413


class RouteError(RequestError):
    """No such path (404), or not with this method (405)."""

    code = "not_found"
    http_status = 404


class MethodError(RouteError):
    """The path exists, the method doesn't."""

    code = "method_not_allowed"
    http_status = 405


class ClientGoneError(ForepageError):
    """The client closed its connection; nobody reads the answer. 499 as proxies log it."""

    code = "client_disconnected"
    http_status = 499
    grpc_status = "CANCELLED"


def error_body(error: ForepageError, request_id: str) -> dict[str, dict[str, str | None]]:
    """OpenAI's JSON for an error, and the id by which logs and traces know the request."""
    return {
        "error": {
            "message": error.message,
            "type": _type_of(error),
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def error_response(
    error: ForepageError, request_id: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The whole answer; errors that pass by themselves say when to come back."""
    sent = dict(headers or {})
    if isinstance(error, AuthenticationError):
        sent["www-authenticate"] = "Bearer"
    if isinstance(error, CapacityError | DependencyError):
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S)))
    return JSONResponse(error_body(error, request_id), error.http_status, sent)


def error_of_validation(errors: Sequence[Mapping[str, Any]], body: object) -> RequestError:
    """One error for what pydantic found, naming the first wrong field.

    `body` is the decoded JSON: it tells keys from the tags that pydantic adds for alternatives.
    """
    if errors[0]["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON, at character {errors[0]['loc'][-1]}")
    if isinstance(body, bytes):
        return RequestError("the body must be JSON, with content-type: application/json")
    if errors[0]["loc"] == ("body",):
        return RequestError("the body must be a JSON object")
    params = [_param(item, body) for item in errors]
    # of the alternatives for one field, the one that got furthest is the one that was meant
    param = max((item for item in params if item.startswith(params[0])), key=len)
    reasons = [_reason(item) for item, its in zip(errors, params, strict=True) if its == param]
    return RequestError(f"{param}: {' or '.join(dict.fromkeys(reasons))}", param)


def _reason(error: Mapping[str, Any]) -> str:
    """pydantic's sentence without its prefix; it holds limits, never the input."""
    return str(error["msg"]).removeprefix("Value error, ")


def _param(error: Mapping[str, Any], body: object) -> str:
    """`messages[0].content` for ("body", "messages", 0, "content", "str")."""
    return "".join(_steps(error, body)).removeprefix(".")


def _steps(error: Mapping[str, Any], body: object) -> Iterator[str]:
    value, path = body, error["loc"][1:]
    for place, part in enumerate(path, start=1):
        is_missing = error["type"] == "missing" and place == len(path)  # what is missing is a key, no tag
        if isinstance(part, int) and isinstance(value, list):
            yield f"[{part}]"
            value = value[part] if part < len(value) else None
        elif isinstance(value, dict) and (part in value or is_missing):
            yield f".{part}"
            value = value.get(part)


def _type_of(error: ForepageError) -> str:
    if isinstance(error, AuthenticationError):
        return "authentication_error"
    if isinstance(error, RequestError):
        return "invalid_request_error"
    if isinstance(error, RateLimitError):
        return "rate_limit_error"
    return "server_error"
