"""How a child's log lines are shown."""

from pathlib import Path

from forepage.launch.child_log import last_lines, render_warning


def test_only_warnings_and_worse_are_shown() -> None:
    assert render_warning(b'{"level": "info", "event": "fine"}') is None
    assert render_warning(b"Traceback (most recent call last):") is None
    assert render_warning(b'{"level": "warning", "event": "late", "by_ms": 3}') == "warning: late by_ms=3"
    assert render_warning(b'{"level": "error", "event": "gone", "logger": "x"}') == "error: gone"


def test_torn_json_is_not_a_record() -> None:
    assert render_warning(b'{"level": "warning", "ev') is None


def test_last_lines_spell_out_exceptions_and_keep_plain_text(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_bytes(b'plain\n{"level": "error", "event": "down", "exception": "Traceback\\n  line\\nBoom"}\n')
    assert last_lines(log, 3) == ["Traceback", "  line", "Boom"]
    assert last_lines(log, 10)[0] == "plain"
