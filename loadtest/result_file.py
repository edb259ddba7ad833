"""What every result file says first: what was measured, how, on what machine, of which commit, and when.

The tools that measure add their rows, and may add more behind them.
"""

import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def result_file(
    what: str,
    *,
    command: str,
    device: Any,
    config: Mapping[str, Any],
    ceilings: Mapping[str, Any] | None = None,
    why: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The whole file; `why` says it of each figure of the head that is missing, but of the commit."""
    commit = commit_of_tree()
    return {
        "what": what,
        "command": command,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "ceilings": ceilings,
        "config": dict(config),
        "why": dict(why) if commit else {**why, "commit": "not run in a git work tree"},
        "rows": list(rows),
    }


def commit_of_tree() -> str | None:
    """The commit of these files, "-dirty" behind it if they were changed; None outside a work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
