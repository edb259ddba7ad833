"""How a run goes: answers, how many of them right, how many failed, and how fast they come."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from loadtest.quality.answers import Answer

LINE_EVERY_S = 30.0
"""Where no terminal shows the bar."""


class Tally:
    """Counts answers and shows them."""

    def __init__(self, progress: Progress, bar: TaskID, *, shows_lines: bool) -> None:
        self.right = self.asked = self.failed = 0
        self.is_whole = True
        self._progress, self._bar, self._shows_lines = progress, bar, shows_lines
        self._began_s = self._shown_s = time.monotonic()

    @classmethod
    @contextmanager
    def shown(cls, *, total: int, done: int) -> Iterator["Tally"]:
        """With a bar on a terminal, else a line now and then."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        is_terminal = sys.stderr.isatty()
        with Progress(*columns, disable=not is_terminal) as progress:
            bar = progress.add_task("asking", total=total, completed=min(total, done))
            yield cls(progress, bar, shows_lines=not is_terminal)

    def add(self, answer: Answer) -> None:
        """One more."""
        self.asked += 1
        self.failed += answer.error is not None
        self.right += answer.score >= 1.0
        text = f"{answer.suite} {answer.length_tokens} {self.right}/{self.asked} right"
        self._progress.update(self._bar, advance=1, description=text)
        now_s = time.monotonic()
        if self._shows_lines and now_s - self._shown_s > LINE_EVERY_S:
            self._shown_s = now_s
            rate = self.asked / (now_s - self._began_s)
            print(f"{text}, {self.failed} failed, {rate:.1f} answers/s", file=sys.stderr, flush=True)
