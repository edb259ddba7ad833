"""Every name that leaves us as a span, attribute or metric, and the set-up of traces and metrics.

Names follow the GenAI conventions where they have one, else `forepage.*`. Exporters are the SDK's
business: OTLP is on when OTEL_EXPORTER_OTLP_ENDPOINT (or its traces/metrics form) is set, Prometheus
when a process has a metrics port. Ids never become metric labels.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation, UpDownCounter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from prometheus_client import start_http_server

from forepage.exposition import ExpositionReader

AttributeValue = str | int | float | bool | Sequence[str]
Observed = tuple[float, Mapping[str, AttributeValue]]
"""A gauge's value, and its attributes by Attr member name, lower case."""


class SpanName(StrEnum):
    """Every span. A request's tree: see SPAN_PARENTS."""

    HTTP_REQUEST = "forepage.gateway.request"
    GATEWAY_GENERATE = "forepage.gateway.generate"
    WORKER_GENERATE = "forepage.worker.generate"
    WORKER_ADMIT = "forepage.worker.admit"
    WORKER_PREFILL = "forepage.worker.prefill"
    WORKER_DECODE = "forepage.worker.decode"
    INTERVAL = "forepage.lookahead.interval"
    PREDICT = "forepage.lookahead.predict"
    LOAD = "forepage.lookahead.load"
    WAIT = "forepage.lookahead.wait"
    COMMIT = "forepage.lookahead.commit"
    INDEX_LOOKAHEAD = "forepage.index.lookahead"
    COLDPOOL_RESERVE = "forepage.coldpool.reserve"
    COLDPOOL_LEASE = "forepage.coldpool.lease_prefix"
    COLDPOOL_PUBLISH = "forepage.coldpool.publish"
    COLDPOOL_RELEASE = "forepage.coldpool.release"


SPAN_PARENTS: dict[SpanName, SpanName | None] = {
    SpanName.HTTP_REQUEST: None,
    SpanName.GATEWAY_GENERATE: SpanName.HTTP_REQUEST,
    SpanName.WORKER_GENERATE: SpanName.GATEWAY_GENERATE,
    SpanName.WORKER_ADMIT: SpanName.WORKER_GENERATE,
    SpanName.WORKER_PREFILL: SpanName.WORKER_GENERATE,
    SpanName.WORKER_DECODE: SpanName.WORKER_GENERATE,
    SpanName.INTERVAL: SpanName.WORKER_GENERATE,
    SpanName.PREDICT: SpanName.INTERVAL,
    SpanName.LOAD: SpanName.INTERVAL,
    SpanName.WAIT: SpanName.INTERVAL,
    SpanName.COMMIT: SpanName.INTERVAL,
    SpanName.INDEX_LOOKAHEAD: SpanName.PREDICT,
    SpanName.COLDPOOL_RESERVE: SpanName.WORKER_ADMIT,
    SpanName.COLDPOOL_LEASE: SpanName.WORKER_ADMIT,
    SpanName.COLDPOOL_PUBLISH: SpanName.WORKER_GENERATE,
    SpanName.COLDPOOL_RELEASE: SpanName.WORKER_GENERATE,
}
"""Who is whose parent; the end-to-end test asserts these edges."""


class Attr(StrEnum):
    """Every attribute of spans and metrics."""

    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    REQUEST_MODEL = "gen_ai.request.model"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    TOKEN_TYPE = "gen_ai.token.type"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    HTTP_METHOD = "http.request.method"
    HTTP_ROUTE = "http.route"
    HTTP_STATUS = "http.response.status_code"
    ERROR_TYPE = "error.type"
    REQUEST_ID = "forepage.request.id"
    SEQUENCE_ID = "forepage.sequence.id"
    WORKER_ID = "forepage.worker.id"
    MODE = "forepage.residency.mode"
    KEPT_FULL = "forepage.residency.kept_full"
    INTERVAL = "forepage.lookahead.interval"
    POSITION = "forepage.lookahead.position"
    DESIRED_BLOCKS = "forepage.lookahead.desired_blocks"
    LOADED_BLOCKS = "forepage.lookahead.loaded_blocks"
    DROPPED_BLOCKS = "forepage.lookahead.dropped_blocks"
    RESIDENT_BLOCKS = "forepage.lookahead.resident_blocks"
    LATENCY_MS = "forepage.prefetch.latency_ms"
    COMMIT_STEPS = "forepage.prefetch.commit_steps"
    PHASE = "forepage.prefetch.phase"
    OUTCOME = "forepage.lookahead.outcome"
    FALLBACK = "forepage.fallback"
    EVIDENCE_RECALL = "forepage.evidence.recall"
    CACHED_TOKENS = "forepage.cached_tokens"
    NUM_BLOCKS = "forepage.num_blocks"
    NUM_AUDITS = "forepage.num_audits"
    REASON = "forepage.reason"
    STATE = "forepage.state"
    POOL = "forepage.pool"
    CACHE = "forepage.cache"


class MetricName(StrEnum):
    """Every instrument; unit and description are in INSTRUMENTS."""

    REQUEST_DURATION = "gen_ai.server.request.duration"
    TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
    TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
    TOKENS = "forepage.tokens"
    REQUESTS_RUNNING = "forepage.requests.running"
    REFUSALS = "forepage.refusals"
    PREFETCH_LATENCY = "forepage.prefetch.latency"
    COMMIT_STEPS = "forepage.prefetch.commit_steps"
    STALLED = "forepage.decode.stalled"
    PREFETCH_BYTES = "forepage.prefetch.bytes"
    DEMAND_BYTES = "forepage.demand.bytes"
    LATE_PLANS = "forepage.lookahead.late_plans"
    DISCARDED_PLANS = "forepage.lookahead.discarded_plans"
    FALLBACKS = "forepage.fallbacks"
    EVIDENCE_RECALL = "forepage.evidence.recall"
    MISSED_MASS = "forepage.evidence.missed_mass"
    ESCALATIONS = "forepage.escalations"
    REDONE_STEPS = "forepage.redone_steps"
    KV_FOOTPRINT = "forepage.kv.footprint"
    PREDICTIONS = "forepage.index.predictions"
    INDEX_LATENCY = "forepage.index.latency"
    BLOCKS = "forepage.blocks"
    ARENA_SLOTS = "forepage.coldpool.slots"
    EVICTIONS = "forepage.coldpool.evictions"
    DAMAGED = "forepage.coldpool.damaged_records"
    DIRECTORY_DROPPED = "forepage.coldpool.directory_writes_dropped"
    PREFIX_TOKENS = "forepage.prefix.tokens"
    PREFILL_TOKENS = "forepage.prefill.tokens"
    ROOM_MOVES = "forepage.room.moves"
    ROOM_MOVE_TIME = "forepage.room.move_time"
    ROOM_BYTES = "forepage.room.bytes"
    SEQUENCES = "forepage.worker.sequences"
    CACHE_HITS = "forepage.cache.hits"
    CACHE_MISSES = "forepage.cache.misses"
    HOST_TO_DEVICE = "forepage.host_to_device.bytes"
    DEVICE_TO_HOST = "forepage.device_to_host.bytes"
    PENDING_WRITES = "forepage.write_back.pending"
    RECORD_LIFETIME = "forepage.coldpool.record.lifetime"
    RECORD_IDLE = "forepage.coldpool.record.idle_before_evict"
    RECORD_REUSE_GAP = "forepage.coldpool.record.reuse_gap"
    DECODE_GRAPHS = "forepage.decode.graphs"
    DECODE_GRAPH_BYTES = "forepage.decode.graph_bytes"


_KINDS: dict[MetricName, tuple[str, str, str]] = {
    MetricName.REQUEST_DURATION: ("histogram", "s", "Time from a request's arrival to its end"),
    MetricName.TIME_TO_FIRST_TOKEN: ("histogram", "s", "Time from a request's arrival to its first token"),
    MetricName.TIME_PER_OUTPUT_TOKEN: (
        "histogram",
        "s",
        "Time between tokens after the first, mean of a request",
    ),
    MetricName.TOKENS: ("counter", "{token}", "Tokens by gen_ai.token.type"),
    MetricName.REQUESTS_RUNNING: ("updown", "{request}", "Requests in flight"),
    MetricName.REFUSALS: ("counter", "{request}", "Requests refused, by reason"),
    MetricName.PREFETCH_LATENCY: ("histogram", "ms", "Boundary to commit, in all and by phase"),
    MetricName.COMMIT_STEPS: ("histogram", "{step}", "Decode steps from a boundary to its plan's commit"),
    MetricName.STALLED: ("counter", "s", "Time in which paging kept a sequence from decoding, by reason"),
    MetricName.PREFETCH_BYTES: ("counter", "By", "Bytes loaded because a plan asked for them"),
    MetricName.DEMAND_BYTES: ("counter", "By", "Bytes of rows pulled within a step"),
    MetricName.LATE_PLANS: ("counter", "{plan}", "Plans that came after the step that should have used them"),
    MetricName.DISCARDED_PLANS: ("counter", "{plan}", "Plans of an old boundary or incarnation, thrown away"),
    MetricName.FALLBACKS: ("counter", "{fallback}", "Times something else was done than meant, by which"),
    MetricName.EVIDENCE_RECALL: ("histogram", "1", "Evidence recall of audited layers"),
    MetricName.MISSED_MASS: ("histogram", "1", "Softmax mass on absent entries at audited layers"),
    MetricName.ESCALATIONS: ("counter", "{escalation}", "Audits below the floor that were answered, by how"),
    MetricName.REDONE_STEPS: ("counter", "{step}", "Decode steps made again, what they missed being loaded"),
    MetricName.KV_FOOTPRINT: (
        "histogram",
        "1",
        "KV bytes on the device over those of mode full, a request's mean",
    ),
    MetricName.PREDICTIONS: ("counter", "{prediction}", "Plans made"),
    MetricName.INDEX_LATENCY: ("histogram", "ms", "Time the index took for one question"),
    MetricName.BLOCKS: ("observed", "{block}", "Blocks of the device pools by pool and state"),
    MetricName.SEQUENCES: ("observed", "{sequence}", "Sequences of a worker, running or waiting"),
    MetricName.CACHE_HITS: ("counter", "{lookup}", "What was wanted and there, by forepage.cache"),
    MetricName.CACHE_MISSES: ("counter", "{lookup}", "What was wanted and had to be fetched or computed"),
    MetricName.HOST_TO_DEVICE: ("counter", "By", "Bytes that came from the cold pool, by reason"),
    MetricName.DEVICE_TO_HOST: ("counter", "By", "Bytes of records written to the cold pool"),
    MetricName.PENDING_WRITES: ("updown", "{record}", "Records being copied to the cold pool or published"),
    MetricName.RECORD_LIFETIME: ("histogram", "s", "From a record's publication to its eviction"),
    MetricName.RECORD_IDLE: ("histogram", "s", "From a record's last release to its eviction"),
    MetricName.RECORD_REUSE_GAP: ("histogram", "s", "From a record's release to its next use"),
    MetricName.ARENA_SLOTS: ("updown", "{slot}", "Arena slots by state"),
    MetricName.EVICTIONS: ("counter", "{record}", "Records evicted from the arena"),
    MetricName.DAMAGED: ("counter", "{record}", "Records refused because of their checksum"),
    MetricName.DIRECTORY_DROPPED: ("counter", "{write}", "Directory writes lost while Redis was down"),
    MetricName.ROOM_MOVES: ("counter", "{move}", "Sequences kept full by room, paged for others, and back"),
    MetricName.ROOM_MOVE_TIME: (
        "histogram",
        "ms",
        "From the decision of such a move to its commit, by reason",
    ),
    MetricName.ROOM_BYTES: (
        "counter",
        "By",
        "Bytes of the device that such moves loaded or dropped, by reason",
    ),
    MetricName.PREFILL_TOKENS: ("counter", "{token}", "Prompt tokens that were processed"),
    MetricName.DECODE_GRAPHS: ("updown", "{graph}", "CUDA graphs of decode steps kept"),
    MetricName.DECODE_GRAPH_BYTES: ("updown", "By", "Device memory of the pool that decode graphs share"),
    MetricName.PREFIX_TOKENS: ("counter", "{token}", "Prompt tokens that were not prefilled again"),
}


OBSERVED = tuple(name for name, (kind, _, _) in _KINDS.items() if kind == "observed")
"""Gauges: what `Telemetry.observe` makes, where something is there to be read."""


@dataclass(frozen=True)
class Telemetry:
    """A process's tracer and instruments; made once by `open_telemetry` and passed around."""

    tracer: Tracer
    counters: Mapping[MetricName, Counter]
    updowns: Mapping[MetricName, UpDownCounter]
    histograms: Mapping[MetricName, Histogram]
    _meter: Meter
    _tracer_provider: TracerProvider
    _meter_provider: MeterProvider

    def count(self, name: MetricName, value: float = 1, **attributes: AttributeValue) -> None:
        """Add to a counter; attributes are keyed by Attr member name, lower case (`reason="late"`)."""
        self.counters[name].add(value, _named(attributes))

    def move(self, name: MetricName, value: float, **attributes: AttributeValue) -> None:
        """Move an up-down counter."""
        self.updowns[name].add(value, _named(attributes))

    def record(
        self, name: MetricName, value: float, *, span: Span | None = None, **attributes: AttributeValue
    ) -> None:
        """Record into a histogram; `span` is what the sample's exemplar leads to."""
        context = None if span is None else trace.set_span_in_context(span)
        self.histograms[name].record(value, _named(attributes), context)

    def observe(self, name: MetricName, read: Callable[[], Iterable[Observed]]) -> None:
        """Make a gauge of what `read` (any thread) says when metrics are collected; once a process."""
        _, unit, description = _KINDS[name]

        def observations(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, _named(attributes)) for value, attributes in read()]

        self._meter.create_observable_gauge(name, [observations], unit=unit, description=description)

    def start_span(
        self,
        name: SpanName,
        parent: Span | Context | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        start_ns: int | None = None,
        **attributes: AttributeValue,
    ) -> Span:
        """Start a span under `parent` (a span, a received context, or none)."""
        return self._start(name, parent, kind, start_ns, attributes)

    def _start(
        self,
        name: SpanName,
        parent: Span | Context | None,
        kind: SpanKind,
        start_ns: int | None,
        attributes: Mapping[str, AttributeValue],
    ) -> Span:
        context = trace.set_span_in_context(parent) if isinstance(parent, Span) else parent
        return self.tracer.start_span(
            name, context=context, kind=kind, start_time=start_ns, attributes=_named(attributes)
        )

    @contextmanager
    def span(
        self,
        name: SpanName,
        parent: Span | Context | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        **attributes: AttributeValue,
    ) -> Iterator[Span]:
        """A span around a block; an exception marks it failed and goes on."""
        span = self._start(name, parent, kind, None, attributes)
        try:
            yield span
        except BaseException as error:
            fail_span(span, error)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Flush and stop the exporters."""
        self._tracer_provider.shutdown()
        self._meter_provider.shutdown()


def open_telemetry(
    service: str,
    *,
    instance_id: str,
    metrics_port: int = 0,
    prometheus: bool = False,
    span_processors: Sequence[SpanProcessor] = (),
    metric_readers: Sequence[MetricReader] = (),
) -> Telemetry:
    """Set up traces and metrics of one process.

    `prometheus` registers with the default prometheus_client registry (the gateway serves it at
    /metrics); `metrics_port` also serves it on its own port. `span_processors` take what is not exported
    over OTLP (span_log.py); readers are for tests.
    """
    resource = Resource.create({"service.name": f"forepage-{service}", "service.instance.id": instance_id})
    tracer_provider = TracerProvider(resource=resource)
    for processor in span_processors:
        tracer_provider.add_span_processor(processor)
    if _otlp_endpoint("TRACES"):
        tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    readers = list(metric_readers)
    if prometheus or metrics_port:
        readers.append(ExpositionReader())
    if metrics_port:
        start_http_server(metrics_port, addr="127.0.0.1")
    if _otlp_endpoint("METRICS"):
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    meter_provider = MeterProvider(resource=resource, metric_readers=readers)
    meter = meter_provider.get_meter("forepage")
    return Telemetry(
        tracer=tracer_provider.get_tracer("forepage"),
        counters={name: _counter(meter, name) for name in _of_kind("counter")},
        updowns={name: _updown(meter, name) for name in _of_kind("updown")},
        histograms={name: _histogram(meter, name) for name in _of_kind("histogram")},
        _meter=meter,
        _tracer_provider=tracer_provider,
        _meter_provider=meter_provider,
    )


def set_attributes(span: Span, **attributes: AttributeValue) -> None:
    """Set attributes by Attr member name, lower case."""
    span.set_attributes(_named(attributes))


def fail_span(span: Span, error: BaseException) -> None:
    """Mark a span failed: by code and message if it is ours, else by class (its text may be a prompt's)."""
    span.set_attribute(Attr.ERROR_TYPE, getattr(error, "code", type(error).__name__))
    span.set_status(Status(StatusCode.ERROR, getattr(error, "message", type(error).__name__)[:200]))


def _named(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    return {Attr[name.upper()].value: value for name, value in attributes.items()}


def _otlp_endpoint(signal: str) -> str | None:
    names = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next(filter(None, map(os.environ.get, names)), None)


def _of_kind(kind: str) -> list[MetricName]:
    return [name for name, (its, _, _) in _KINDS.items() if its == kind]


def _counter(meter: Meter, name: MetricName) -> Counter:
    return meter.create_counter(name, unit=_KINDS[name][1], description=_KINDS[name][2])


def _updown(meter: Meter, name: MetricName) -> UpDownCounter:
    return meter.create_up_down_counter(name, unit=_KINDS[name][1], description=_KINDS[name][2])


_BUCKETS: dict[str, list[float]] = {
    "s": [*(0.01 * 2**power for power in range(14)), 327.68, 1310.72, 5242.88, 20971.52, 83886.08],
    "ms": [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000],
    "{step}": [*range(9), 10, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024],
    "1": [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0],
}


def _histogram(meter: Meter, name: MetricName) -> Histogram:
    _, unit, description = _KINDS[name]
    return meter.create_histogram(
        name, unit=unit, description=description, explicit_bucket_boundaries_advisory=_BUCKETS[unit]
    )
