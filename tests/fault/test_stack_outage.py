"""The cold pool manager gone for a full minute: live answers go on, new ones are told when to come back.

Every other outage that the tests make ends within seconds. A minute is longer than any patience a process has
with a peer: a ping's 15 s, the longest pause between two tries to connect, the life of a card in Redis.
"""

import threading
import time
from pathlib import Path

import pytest

from rigs.faulty import SMALL_PAGES, Faulty, Once, code_of, short_request
from rigs.seen import Seen
from rigs.stack import running_stack, wait_until

GONE_S = 60.0
ASK_EVERY_S = 5.0
REFUSED_WITHIN_S = 30.0
"""A request waits for its admission for 3 s here; the rest because the machine may be busy."""
NUM_TOKENS = 40
pytestmark = pytest.mark.timeout(600)
SETTINGS = SMALL_PAGES | {"FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(16 << 20)}


def test_a_minute_without_the_cold_pool_costs_new_requests_only(tmp_path: Path, seen: Seen) -> None:
    with running_stack(tmp_path, settings=SETTINGS) as stack:
        faulty = Faulty(stack, code_of(16), NUM_TOKENS).learn(mode="exact")
        faulty.wait_idle()
        cached = stack.arena().cached
        assert cached > 0
        answer = faulty.ask(on_chunk=Once(lambda: stack.kill("coldpool")))
        began_s = time.monotonic()
        assert faulty.is_right(answer), "it goes on with the blocks that it leases"
        num_refused = 0
        while time.monotonic() - began_s < GONE_S:
            asked_s = time.monotonic()
            refused = short_request(stack)
            assert time.monotonic() - asked_s < REFUSED_WITHIN_S
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            num_refused += 1
            threading.Event().wait(max(0.0, asked_s + ASK_EVERY_S - time.monotonic()))
        assert num_refused > 1, "it was asked again and again"
        assert not stack.has_ended("worker"), "a worker waits for its cold pool"
        assert (stack.worker().running, stack.worker().waiting) == (0, 0), (
            "nobody waits in it for the minute to end"
        )

        began_s = time.monotonic()
        stack.start("coldpool")

        def is_served() -> bool:
            return short_request(stack).status_code == 200

        wait_until(is_served, timeout_s=90, what="requests are served again")
        recovery_s = time.monotonic() - began_s
        again = faulty.ask()
        assert faulty.is_right(again)
        assert again.usage["prompt_tokens_details"]["cached_tokens"] > 0, "the next one adopted the records"
        assert stack.arena().cached + stack.arena().leased >= cached
        faulty.wait_idle()
        seen(
            f"killed in mid-stream, gone for {GONE_S:g} s",
            "coldpool",
            promised="live answers go on; new ones are refused with Retry-After; the next one adopts all",
            recovery_s=recovery_s,
            requests=num_refused + 4,
        )
    assert stack.leftovers() == []
