"""Where `forepage up` talks: lines for everybody, a moving status line on a terminal.

A reader that has gone away (a closed terminal, `| head`) ends the talk, never the work: children must still
be ended in order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

_GONE = (OSError, SystemExit)  # rich leaves by SystemExit when its pipe breaks


class Terminal:
    """Prints to a console for as long as somebody reads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Print text."""
        with suppress(*_GONE):
            self._console.print(text)

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """A status line for the block, set by calling what is yielded; nothing outside a terminal."""
        status = self._console.status("")
        with suppress(*_GONE):
            status.start()
        try:
            yield status.update
        finally:
            with suppress(*_GONE):
                status.stop()
