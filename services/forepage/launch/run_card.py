"""What a running `forepage up` says of itself to `forepage status` and `trace`: the text of its lock.

Only the lock's holder writes it, and it counts only while the lock is held, so a card that was left behind by
a killed process is no card.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from forepage.launch.instance import is_held, lock_path


@dataclass(frozen=True)
class RunCard:
    """Where one `forepage up` runs. `addresses` are host:port by role; `started_s` is Unix time."""

    pid: int
    started_s: float
    run_dir: str
    span_dir: str
    addresses: dict[str, str]

    def leave(self, shm_dir: Path, instance: str) -> None:
        """Write it into the instance's lock, which this process holds."""
        descriptor = os.open(lock_path(shm_dir, instance), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(descriptor, json.dumps(asdict(self)).encode())
        finally:
            os.close(descriptor)


def running_card(shm_dir: Path, instance: str) -> RunCard | None:
    """The card of the `forepage up` that runs this instance on this host; None if there is none."""
    path = lock_path(shm_dir, instance)
    if not is_held(path):
        return None
    try:
        return RunCard(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # gone just now, or not written yet
        return None
