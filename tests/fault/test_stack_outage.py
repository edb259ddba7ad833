"""The cold pool manager gone for a full minute: live answers go on, new ones are told when to come back.

Every other outage that the tests make ends within seconds. A minute is longer than any patience a process has
with a peer: a ping's 15 s, the longest pause between two tries to connect, the life of a card in Redis.
"""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from rigs.chat import Answer, stream_chat
from rigs.seen import Seen
from rigs.stack import Stack, running_stack, wait_until

GONE_S = 60.0
ASK_EVERY_S = 5.0
REFUSED_WITHIN_S = 30.0
"""A request waits for its admission for 3 s here; the rest because the machine may be busy."""
MESSAGES = [
    {"role": "user", "content": "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(16))}
]
NUM_TOKENS = 40
pytestmark = pytest.mark.timeout(600)
SETTINGS = {
    "FOREPAGE_WORKER__RECENT_TOKENS": "256",
    "FOREPAGE_WORKER__INTERVAL_STEPS": "16",
    "FOREPAGE_WORKER__FULL_SHARE": "0",
    "FOREPAGE_WORKER__EARLY_AUDIT_STEPS": "0",
    "FOREPAGE_WORKER__RANDOM_AUDITS": "1",
    "FOREPAGE_WORKER__ADMISSION_TIMEOUT_S": "3",
    "FOREPAGE_WORKER__KV_BYTES": str(32 << 20),
    "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(16 << 20),
    "FOREPAGE_GATEWAY__WORKER_POLL_S": "0.2",
    "OMP_NUM_THREADS": "1",
}


def ask(stack: Stack, **fields: Any) -> Answer:
    return stream_chat(
        stack.url, MESSAGES, mode="exact", budget_blocks=1, **{"max_tokens": NUM_TOKENS, **fields}
    )


def refusal(stack: Stack) -> httpx.Response:
    """What a short request gets."""
    return httpx.post(
        f"{stack.url}/v1/completions",
        json={"model": "forepage-seeded", "prompt": "x", "max_tokens": 2},
        timeout=60,
    )


def is_idle(stack: Stack) -> bool:
    arena, worker = stack.arena(), stack.worker()
    return (
        (arena.leased, arena.writing, worker.running, worker.arena_slots_held) == (0, 0, 0, 0)
        and arena.free + arena.cached == arena.total
        and (worker.row_blocks_free, worker.key_blocks_free, worker.slots_free)
        == (worker.row_blocks_total, worker.key_blocks_total, worker.max_running)
    )


def test_a_minute_without_the_cold_pool_costs_new_requests_only(tmp_path: Path, seen: Seen) -> None:
    with running_stack(tmp_path, settings=SETTINGS) as stack:
        truth = ask(stack).text
        wait_until(lambda: is_idle(stack), timeout_s=30, what="everything held is given back")
        cached = stack.arena().cached
        assert cached > 0

        def kill(answer: Answer) -> None:
            if answer.num_chunks == 12:
                stack.kill("coldpool")

        answer = ask(stack, on_chunk=kill)
        began_s = time.monotonic()
        assert (answer.error, answer.text) == (None, truth), "it goes on with the blocks that it leases"
        num_refused = 0
        while time.monotonic() - began_s < GONE_S:
            asked_s = time.monotonic()
            refused = refusal(stack)
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
            return refusal(stack).status_code == 200

        wait_until(is_served, timeout_s=90, what="requests are served again")
        recovery_s = time.monotonic() - began_s
        again = ask(stack)
        assert (again.error, again.text) == (None, truth)
        assert again.usage["prompt_tokens_details"]["cached_tokens"] > 0, "the next one adopted the records"
        assert stack.arena().cached + stack.arena().leased >= cached
        wait_until(lambda: is_idle(stack), timeout_s=30, what="everything held is given back")
        seen(
            f"killed in mid-stream, gone for {GONE_S:g} s",
            "coldpool",
            promised="live answers go on; new ones are refused with Retry-After; the next one adopts all",
            recovery_s=recovery_s,
            requests=num_refused + 4,
        )
    assert stack.leftovers() == []
