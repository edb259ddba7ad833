"""Receives spans over OTLP/gRPC, as a collector would, and keeps them for the test to look at."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it came over the wire."""

    name: str
    service: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]


@dataclass
class SpanReceiver(rpc.TraceServiceServicer):
    """A trace service that only collects."""

    _spans: list[ReceivedSpan] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def Export(  # noqa: N802
        self,
        request: pb.ExportTraceServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ExportTraceServiceResponse:
        """Take a batch."""
        with self._lock:
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes).get("service.name", "")
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._spans.append(
                            ReceivedSpan(
                                name=span.name,
                                service=service,
                                trace_id=span.trace_id,
                                span_id=span.span_id,
                                parent_id=span.parent_span_id,
                                start_ns=span.start_time_unix_nano,
                                end_ns=span.end_time_unix_nano,
                                attributes=_attributes(span.attributes),
                            )
                        )
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: bytes) -> list[ReceivedSpan]:
        """Every span of one trace so far."""
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]


@contextmanager
def receiving_spans() -> Iterator[tuple[SpanReceiver, str]]:
    """A running receiver and its endpoint."""
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    receiver = SpanReceiver()
    rpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        server.stop(1.0).wait()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
