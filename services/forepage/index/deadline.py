"""When the asker of a question stops waiting; work looks here between its parts and gives up."""

from collections.abc import Callable
from dataclasses import dataclass

from forepage.errors import DeadlineError


@dataclass(frozen=True)
class Deadline:
    """`at_s` on the clock's scale; None: the asker waits as long as it takes."""

    at_s: float | None
    clock: Callable[[], float]

    @classmethod
    def after_ms(cls, deadline_ms: int, clock: Callable[[], float]) -> "Deadline":
        """Counted from now; 0 is no deadline (the field was not set)."""
        return cls(clock() + deadline_ms / 1000 if deadline_ms else None, clock)

    def remaining_s(self) -> float | None:
        """Time left, never negative; None without a deadline."""
        return None if self.at_s is None else max(0.0, self.at_s - self.clock())

    def check(self) -> None:
        """Raises: DeadlineError once it has passed."""
        if self.remaining_s() == 0.0:
            raise deadline_error()


def deadline_error() -> DeadlineError:
    """The error of a question that was not answered in time."""
    return DeadlineError("the question was not answered within its deadline_ms", param="deadline_ms")
