"""What a run writes down as it goes: a line a reading (shown and in log.jsonl), and a bar on a terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_FILE = "log.jsonl"


class Journal:
    """Open once for a run; a resumed run appends."""

    def __init__(self, folder: Path, console: Console, bar: tuple[Progress, TaskID] | None) -> None:
        self._path = folder / LOG_FILE
        self._console = console
        self._bar = bar

    def note(self, text: str) -> None:
        """A line for people."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def write(self, row: dict[str, Any], text: str) -> None:
        """A row for the log file, and the same for people."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.note(text)

    def advance(self, seconds: float, description: str) -> None:
        """Move the bar to so many seconds of the run."""
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=seconds, description=description)


@contextmanager
def journal(folder: Path, total_seconds: float) -> Iterator[Journal]:
    """A journal in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Journal(folder, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield Journal(
            folder, progress.console, (progress, progress.add_task("training", total=total_seconds))
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
