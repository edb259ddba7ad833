"""How a trace goes on in another process: W3C trace context in gRPC metadata, HTTP headers and messages."""

from collections.abc import Mapping

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span


def outgoing_metadata(span: Span | None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata that makes the callee's spans children of `span`."""
    carrier: dict[str, str] = {}
    if span is not None:
        propagate.inject(carrier, context=trace.set_span_in_context(span))
    return tuple(carrier.items())


def incoming_context(metadata: Mapping[str, str]) -> Context:
    """The caller's trace context, from HTTP headers or gRPC metadata (lower-case keys)."""
    return propagate.extract(dict(metadata))


def traceparent_of(span: Span) -> str:
    """The W3C header value of a span, for messages of a long-lived stream."""
    return dict(outgoing_metadata(span)).get("traceparent", "")


def context_of_traceparent(traceparent: str) -> Context:
    """The context that a `traceparent` value names."""
    return propagate.extract({"traceparent": traceparent})
