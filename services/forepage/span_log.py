"""The newest finished spans of each process in a folder of bounded size, for `forepage trace` without Jaeger.

One JSON object a line. A process owns two files, `<service>-<n>.jsonl` and the older `.old.jsonl`, for as
long as it holds the flock of `<service>-<n>.lock`; one that starts again goes on with the files of the last.
Spans hold ids, counts and times, never text of a request, so neither do the files.
"""

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from forepage.settings import TelemetrySettings
from forepage.settings_environment import SettingsError

FLUSH_MS = 500
"""A span is on disk that soon after its end."""
SUFFIX, OLD_SUFFIX = ".jsonl", ".old.jsonl"


@dataclass(frozen=True)
class StoredSpan:
    """One finished span. Ids are lower-case hex, times Unix nanoseconds; `error` is None unless it failed."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    error: str | None
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, span: ReadableSpan) -> "StoredSpan":
        """What we keep of a finished span of the SDK."""
        context, failed = span.context, span.status.status_code is StatusCode.ERROR
        assert context is not None
        return cls(
            name=span.name,
            service=str(span.resource.attributes.get("service.name", "")),
            trace_id=f"{context.trace_id:032x}",
            span_id=f"{context.span_id:016x}",
            parent_id=f"{span.parent.span_id:016x}" if span.parent is not None else None,
            start_ns=span.start_time or 0,
            end_ns=span.end_time or 0,
            error=(span.status.description or "failed") if failed else None,
            attributes=dict(span.attributes or {}),
        )

    @property
    def duration_ms(self) -> float:
        """From start to end."""
        return (self.end_ns - self.start_ns) / 1e6


class SpanLog(SpanExporter):
    """Owner of one process's two files; together they stay below `limit_bytes` plus one batch."""

    def __init__(self, folder: Path, service: str, limit_bytes: int) -> None:
        """Raises: OSError when the folder can't be made or written."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock, stem = _own_stem(folder, service)
        self._path = stem.with_suffix(SUFFIX)
        self._old = stem.with_suffix(OLD_SUFFIX)
        self._half_bytes = limit_bytes // 2

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append a batch; a full file becomes the old one, and what was old is gone."""
        lines = "".join(json.dumps(asdict(StoredSpan.of(span))) + "\n" for span in spans).encode()
        try:
            if self._path.exists() and self._path.stat().st_size + len(lines) > self._half_bytes:
                self._path.replace(self._old)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(lines)
        except OSError:  # a full disk costs spans, not requests
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Let another process have the files."""
        os.close(self._lock)


def span_log_processors(service: str, settings: TelemetrySettings) -> list[SpanProcessor]:
    """What `open_telemetry` is to be given so that this process keeps its spans; nothing unless asked for.

    Raises: SettingsError when the folder can't be used.
    """
    if settings.span_dir is None:
        return []
    try:
        log = SpanLog(settings.span_dir, service, settings.span_bytes)
    except OSError as error:
        raise SettingsError(
            f"FOREPAGE_TELEMETRY__SPAN_DIR: cannot write {settings.span_dir}: {error.strerror}"
        ) from error
    return [BatchSpanProcessor(log, schedule_delay_millis=FLUSH_MS)]


def read_spans(folder: Path) -> Iterator[StoredSpan]:
    """Every span of every process in a folder; a line that is half written or damaged is left out."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # it became the old one meanwhile
            continue
        for line in text.splitlines():
            try:
                yield StoredSpan(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue


def _own_stem(folder: Path, service: str) -> tuple[int, Path]:
    """The first number whose lock nobody holds: its descriptor, to be kept open, and the files' stem."""
    for number in itertools.count():
        stem = folder / f"{service}-{number}"
        descriptor = os.open(stem.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor, stem
    raise AssertionError("numbers do not end")
