"""What belongs to one HTTP request from its first byte to its last: id, span, clean-up, metrics, log line.

The outermost middleware. Whatever a route registers on `RequestScope.stack` runs when the answer is out,
or was given up: nothing of a request outlives it. Errors that routes raise become answers here.
"""

import re
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forepage.errors import ForepageError
from forepage.gateway.http_errors import ClientGoneError, error_response
from forepage.telemetry import MetricName, SpanName, Telemetry, fail_span, set_attributes
from forepage.trace_context import incoming_context

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACE_HEADERS = ("traceparent", "tracestate")
_SCOPE_KEY = "forepage.request"


@dataclass
class RequestScope:
    """One request. `operation` and `model` are set once they are known to be ours (metric labels)."""

    request_id: str
    span: Span
    started_s: float = field(default_factory=time.monotonic)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    tenant: str | None = None
    """Whose API key it came with; None: no keys are asked for."""
    key_name: str | None = None
    """The key's own name: what its limits are counted by."""
    operation: str | None = None
    model: str | None = None
    status: int | None = None
    error: BaseException | None = None

    @property
    def error_code(self) -> str | None:
        """What went wrong, as a label."""
        return None if self.error is None else getattr(self.error, "code", "internal_error")

    @property
    def elapsed_s(self) -> float:
        """Time since the request came."""
        return time.monotonic() - self.started_s


def request_scope(scope: Scope) -> RequestScope:
    """Ours behind an ASGI scope inside the middleware."""
    found: RequestScope = scope[_SCOPE_KEY]
    return found


class RequestScopeMiddleware:
    """Opens and closes a RequestScope around the app."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry
        self._log = structlog.get_logger("forepage.gateway")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        offered = headers.get(REQUEST_ID_HEADER, "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        ours = RequestScope(request_id, self._span(scope, headers, request_id))
        scope[_SCOPE_KEY] = ours

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            async with ours.stack:
                await self._answer(ours, scope, receive, send_marked)
        except BaseException as error:
            ours.error = error
            raise
        finally:
            self._close(ours, scope)

    async def _answer(self, ours: RequestScope, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientGoneError as error:
            ours.error = error
        except ForepageError as error:
            ours.error = error
            if ours.status is None:
                await error_response(error, ours.request_id)(scope, receive, send)
        except Exception as error:
            ours.error = error
            self._log.exception("request failed", request_id=ours.request_id)
            if ours.status is None:
                internal = ForepageError("internal error")
                await error_response(internal, ours.request_id)(scope, receive, send)

    def _span(self, scope: Scope, headers: Headers, request_id: str) -> Span:
        if not scope["path"].startswith("/v1/"):
            return INVALID_SPAN  # probes and scrapes are no requests to trace
        parent = incoming_context({name: headers[name] for name in _TRACE_HEADERS if name in headers})
        return self._telemetry.start_span(
            SpanName.HTTP_REQUEST,
            parent,
            kind=SpanKind.SERVER,
            http_method=scope["method"],
            request_id=request_id,
        )

    def _close(self, ours: RequestScope, scope: Scope) -> None:
        status = ours.status or int(getattr(ours.error, "http_status", 500))
        route = getattr(scope.get("route"), "path", "")
        set_attributes(ours.span, http_route=route, http_status=status)
        if ours.error is not None:
            fail_span(ours.span, ours.error)
        ours.span.end()
        labels = {"error_type": ours.error_code} if ours.error_code else {}
        if ours.operation is not None:
            if ours.model is not None:
                labels["request_model"] = ours.model
            self._telemetry.record(
                MetricName.REQUEST_DURATION,
                ours.elapsed_s,
                span=ours.span,
                operation=ours.operation,
                **labels,
            )
            if isinstance(ours.error, ForepageError) and ours.status == ours.error.http_status:
                self._telemetry.count(MetricName.REFUSALS, reason=ours.error.code)
        if scope["path"].startswith("/v1/"):
            # Why it was not served; of what is wrong with a request the client alone is told.
            is_ours = isinstance(ours.error, ForepageError) and ours.error.http_status >= 500
            reason = {"reason": str(ours.error)} if is_ours else {}
            self._log.info(
                "request",
                request_id=ours.request_id,
                method=scope["method"],
                route=route,
                status=status,
                error=ours.error_code,
                duration_s=round(ours.elapsed_s, 4),
                **reason,
            )
