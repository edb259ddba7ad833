"""What every result file says first: what was measured, how, on what machine, of which commit, and when.

The tools that measure add their rows, and may add more behind them.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from forepage.checkout import commit_of_checkout


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
    commit = commit_of_checkout()
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
