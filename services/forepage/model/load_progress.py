"""Shows how far the weights are: a bar on a terminal, else one log line a file. Always on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[Path, int], None]


@contextmanager
def shown_loading(num_bytes: int, console: Console | None = None) -> Iterator[Advance]:
    """Gives a function to call with the file and the bytes of it that have been taken in."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(num_bytes, console) as advance:
            yield advance
    else:
        yield _log(num_bytes)


@contextmanager
def _bar(num_bytes: int, console: Console) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("weights", total=num_bytes)

        def advance(path: Path, count: int) -> None:
            progress.update(task, advance=count, description=path.name)

        yield advance


def _log(num_bytes: int) -> Advance:
    log = structlog.get_logger("forepage.model")
    current: Path | None = None
    done = 0

    def advance(path: Path, count: int) -> None:
        nonlocal current, done
        if path != current:
            log.info("loading weights", file=path.name, loaded_bytes=done, total_bytes=num_bytes)
        current, done = path, done + count

    return advance
