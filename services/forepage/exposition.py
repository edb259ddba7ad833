"""What Prometheus reads of a process: the SDK's exposition, plus who the process is and exemplars.

The SDK's own reader leaves exemplars out, and says only once who the process is; a collector takes the ones
from OTLP and says the other on every series. With this reader a Prometheus that asks the processes themselves
sees what one behind a collector sees, so that rules and dashboards hold either way.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Exemplar as SdkExemplar
from opentelemetry.sdk.metrics.export import HistogramDataPoint, MetricsData
from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

_PROCESS = ("service.name", "service.instance.id")
_NOT_OF_THE_POINT = ("otel_scope_", "service_", "le")
_Bucket = tuple[str, frozenset[tuple[str, str]], str]
"""Instrument as Prometheus spells it without its unit, labels of the point, upper bound."""


class ExpositionReader(PrometheusMetricReader):
    """Serves the default registry of prometheus_client until it is shut down."""

    def __init__(self) -> None:
        own = CollectorRegistry()
        super().__init__(registry=own, resource_attribute_filter=_PROCESS.__contains__)
        self._shown = _WithExemplars(own)
        REGISTRY.register(self._shown)

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        self._shown.exemplars = dict(_exemplars(metrics_data))
        super()._receive_metrics(metrics_data, timeout_millis, **kwargs)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Leave the registry."""
        REGISTRY.unregister(self._shown)
        super().shutdown(timeout_millis, **kwargs)


class _WithExemplars(Collector):
    """Puts each bucket's newest exemplar, of those since the last collection, on its sample."""

    def __init__(self, plain: CollectorRegistry) -> None:
        self._plain = plain
        self.exemplars: Mapping[_Bucket, Exemplar] = {}

    def collect(self) -> Iterable[Metric]:
        """Every family."""
        for family in self._plain.collect():
            base = family.name.removesuffix(f"_{family.unit}")
            family.samples = [self._with_exemplar(base, sample) for sample in family.samples]
            yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: what is measured is known once it is collected."""
        return ()

    def _with_exemplar(self, base: str, sample: Sample) -> Sample:
        if "le" not in sample.labels:
            return sample
        found = self.exemplars.get((base, _of_the_point(sample.labels), sample.labels["le"]))
        return sample._replace(exemplar=found)


def _exemplars(data: MetricsData) -> Iterator[tuple[_Bucket, Exemplar]]:
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    if isinstance(point, HistogramDataPoint):
                        yield from _of_point(_spelt(metric.name), point)


def _of_point(base: str, point: HistogramDataPoint) -> Iterator[tuple[_Bucket, Exemplar]]:
    labels = frozenset((_spelt(key), str(value)) for key, value in (point.attributes or {}).items())
    for exemplar in sorted(point.exemplars, key=lambda one: one.time_unix_nano):
        if exemplar.trace_id is not None and exemplar.span_id is not None:
            yield (base, labels, _upper_bound(point.explicit_bounds, exemplar.value)), _as_exemplar(exemplar)


def _as_exemplar(exemplar: SdkExemplar) -> Exemplar:
    ids = {"trace_id": f"{exemplar.trace_id:032x}", "span_id": f"{exemplar.span_id:016x}"}
    return Exemplar(ids, float(exemplar.value), exemplar.time_unix_nano / 1e9)


def _upper_bound(bounds: Sequence[float], value: float) -> str:
    """Of the value's bucket, as the SDK's reader spells it."""
    place = bisect_left(bounds, value)
    return str(bounds[place]) if place < len(bounds) else "+Inf"


def _of_the_point(labels: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    own = ((key, value) for key, value in labels.items() if not key.startswith(_NOT_OF_THE_POINT))
    return frozenset((key, value) for key, value in own if value)


def _spelt(name: str) -> str:
    return name.replace(".", "_")
