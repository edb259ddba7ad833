"""A server with its own defaults keeps a lone request whole, and says so; one that asks to page pages."""

from pathlib import Path
from typing import Any

import httpx

from forepage.settings import WorkerSettings
from rigs.stack import running_stack

SHIPPED = {"FOREPAGE_WORKER__FULL_SHARE": str(WorkerSettings().full_share)}
TEXT = "All work and no play makes a long document. " * 190
"""8,360 tokens: 24 blocks lie before the tail, and the budget of that length is 8."""


def residency(url: str, **fields: Any) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }
    reply = httpx.post(
        f"{url}/v1/chat/completions", json={"model": "forepage-seeded", **body, **fields}, timeout=120
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json()["usage"]["forepage"])


def test_who_names_no_budget_is_kept_whole_and_who_names_one_pages(tmp_path: Path) -> None:
    with running_stack(tmp_path, settings=SHIPPED) as stack:
        alone = residency(stack.url)
        assert (alone["full_by_room"], alone["full_by_size"]) == (True, False)
        assert alone["paged_steps"] == 0
        assert alone["kv_footprint"] == 1.0
        assert alone["budget_blocks"] == 8
        paged = residency(stack.url, forepage={"budget_blocks": 3})
        assert (paged["full_by_room"], paged["full_by_size"]) == (False, False)
        assert paged["paged_steps"] + paged["exact_steps"] > 0
    assert stack.leftovers() == []
