"""The picture of the page in the documentation: a real decode by the bundled model, in a real browser.

`cd tests && python -m rigs.dashboard_picture` writes docs/dashboard.png; it needs Chromium.
"""

import json
import tempfile
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Route

from forepage.settings import TINY_MODEL
from rigs.browser import opened
from rigs.stack import Stack, running_stack

PICTURE = Path(__file__).parents[2] / "docs" / "dashboard.png"
SIZE = (1180, 935)
CHAT = "/v1/chat/completions"


def decode_beside(stack: Stack, first: int, count: int) -> threading.Thread:
    """Another sequence, so that the list has some."""
    guests = range(first, first + count)
    facts = " ".join(f"The badge number of guest {guest} is {7919 * guest % 9000}." for guest in guests)
    body = {
        "model": "forepage-tiny",
        "messages": [{"role": "user", "content": f"{facts}\n\nWhat is the badge number of guest {first}?"}],
        "max_tokens": 900,
        "ignore_eos": True,
        "forepage": {"budget_blocks": 6},
    }

    def ask() -> None:
        httpx.post(stack.url + CHAT, json=body, timeout=300)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def go_on(route: Route) -> None:
    """The page's own question is decoded beyond the end of its answer."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "max_tokens": 400, "ignore_eos": True}))


def main() -> None:
    """Three sequences; the picture is taken in the third interval of the page's own."""
    settings = {"FOREPAGE_MODEL__PATH": str(TINY_MODEL), "FOREPAGE_WORKER__KV_BYTES": str(256 << 20)}
    with tempfile.TemporaryDirectory() as logs, running_stack(Path(logs), settings=settings) as stack:
        beside = [decode_beside(stack, first, count) for first, count in ((100, 110), (400, 70))]
        with opened(stack.url, size=SIZE) as view:
            page = view.page
            page.wait_for_selector("#list tr:nth-child(2)")
            page.click("#example")
            page.route(f"**{CHAT}", go_on)
            page.click("#send")
            page.wait_for_selector("#map-block:has-text('Interval 3')", timeout=300_000)
            page.screenshot(path=PICTURE)
        for thread in beside:
            thread.join()


if __name__ == "__main__":
    main()
