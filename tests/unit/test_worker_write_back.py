"""Write-back while the cold pool manager is away: retried, and one line in the log at each end."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from forepage.coldpool.records import PublishedRecord, RecordKind, SlotRef
from forepage.errors import DependencyError
from forepage.kv.ids import ArenaId
from forepage.worker import write_back
from forepage.worker.write_back import WriteBack


def answered(value: Any = None, error: Exception | None = None) -> Future[Any]:
    future: Future[Any] = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


def test_an_outage_is_logged_once_and_its_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_back, "RETRY_S", 0.0)
    parts = MagicMock()
    writer = WriteBack(parts)
    record = PublishedRecord(SlotRef(ArenaId(0), 1), b"k" * 32, RecordKind.RESUME, 0, 1, 8, 0)
    for outage in (1, 2):
        parts.arena.publish.side_effect = lambda *_: answered(error=DependencyError("away"))
        for _ in range(2):
            sequence = SimpleNamespace(
                arena=SimpleNamespace(writing=[], resume_refs=[]), span=None, phase=None
            )
            writer._start(write_back._Transfer(sequence, [record], [], [answered(7)]))  # type: ignore[arg-type]
        for _ in range(10):
            writer.tick()
        assert parts.telemetry.count.call_count >= 8, "every failed try is counted"
        assert parts.log.warning.call_count == outage
        assert parts.log.info.call_count == outage - 1
        parts.arena.publish.side_effect = lambda *_: answered([record.slot])
        for _ in range(4):
            writer.tick()
        assert parts.log.info.call_count == outage
        assert not writer._transfers
