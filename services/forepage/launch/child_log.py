"""What a child wrote: followed while it grows (warnings to the console), and its end when it failed.

Children log one JSON object a line (telemetry.open_logs) into a file of their own; anything else (a
traceback, Valkey's lines) stays in the file and is shown only when the child fails.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.2
_TAIL_BYTES = 64 << 10
_SHOWN_LEVELS = frozenset({"warning", "error", "critical"})
_ENVELOPE = frozenset({"event", "level", "logger", "timestamp", "exception"})


async def follow_warnings(path: Path, name: str, tell: Callable[[str], None]) -> None:
    """Tell each new line of level warning and above, until cancelled."""
    with path.open("rb") as log:
        partial = b""
        while True:
            partial += log.read()
            *lines, partial = partial.split(b"\n")
            for line in lines:
                shown = render_warning(line)
                if shown is not None:
                    tell(f"[{name}] {shown}")
            await asyncio.sleep(POLL_S)


def render_warning(line: bytes) -> str | None:
    """A log line for reading if it is a warning or worse, else None."""
    record = _record(line)
    return _rendered(record) if record is not None and record.get("level") in _SHOWN_LEVELS else None


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log for reading: JSON lines shortened, an exception's traceback spelled out."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines: list[str] = []
        for line in log.read().splitlines():
            record = _record(line)
            lines += [line.decode(errors="replace")] if record is None else _rendered(record).splitlines()
    return lines[-count:]


def _record(line: bytes) -> dict[str, object] | None:
    if not line.startswith(b"{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _rendered(record: dict[str, object]) -> str:
    fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in _ENVELOPE)
    text = f"{record.get('level', '')}: {record.get('event', '')} {fields}".rstrip()
    exception = record.get("exception")
    return f"{text}\n{exception}" if exception else text
