"""Where a run's time goes: a line for each phase, with the seconds since the command began."""

import time

_BEGAN_S = time.monotonic()


def say(*what: object) -> None:
    """Print it at once."""
    print(f"[{time.monotonic() - _BEGAN_S:6.1f} s]", *what, flush=True)
