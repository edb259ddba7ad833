"""What tests of faults saw, as `python -m loadtest.soak faults` writes it to reliability.json."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from rigs.seen import Seen


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Seen:
    """Say what a fault did, once everything that was promised has been asserted."""

    def tell(
        fault: str,
        target: str,
        *,
        promised: str,
        recovery_s: float | None,
        requests: int,
        wrong_tokens: int | None = 0,
        lost_tokens: int | None = 0,
        leaked_blocks: int | None = 0,
        **why: str,
    ) -> None:
        row: dict[str, Any] = {
            "fault": fault,
            "target": target,
            "promised": promised,
            "outcome": "kept",
            "recovery_s": None if recovery_s is None else round(recovery_s, 2),
            "wrong_tokens": wrong_tokens,
            "lost_tokens": lost_tokens,
            "leaked_blocks": leaked_blocks,
            "requests": requests,
            "why": {name.removesuffix("_why"): text for name, text in why.items()},
        }
        record_property("reliability", json.dumps(row))

    return tell
