"""A load shows how far it is: a bar on a terminal, a log line a file elsewhere."""

import io
from pathlib import Path

from rich.console import Console
from structlog.testing import capture_logs

from forepage.model.load_progress import shown_loading

FILES = [Path("a.safetensors"), Path("b.safetensors")]


def test_terminal_gets_a_bar_that_ends_full() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with shown_loading(3000, console) as advance:
        advance(FILES[0], 1000)
        advance(FILES[1], 2000)
    shown = console.file
    assert isinstance(shown, io.StringIO)
    assert "b.safetensors" in shown.getvalue()
    assert "3.0/3.0 kB" in shown.getvalue()


def test_log_gets_a_line_a_file() -> None:
    console = Console(file=io.StringIO())
    with capture_logs() as logs, shown_loading(3000, console) as advance:
        for file, count in zip([FILES[0], *FILES], (400, 600, 2000), strict=True):
            advance(file, count)
    assert [(line["file"], line["loaded_bytes"], line["total_bytes"]) for line in logs] == [
        ("a.safetensors", 0, 3000),
        ("b.safetensors", 1000, 3000),
    ]
