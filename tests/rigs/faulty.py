"""A running system with one known question, for tests that break it: ask, compare, see who serves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from rigs.chat import Answer, stream_chat
from rigs.stack import Stack, wait_until

SMALL_PAGES = {
    "FOREPAGE_WORKER__RECENT_TOKENS": "256",
    "FOREPAGE_WORKER__INTERVAL_STEPS": "16",
    "FOREPAGE_WORKER__FULL_SHARE": "0",
    "FOREPAGE_WORKER__EARLY_AUDIT_STEPS": "0",
    "FOREPAGE_WORKER__RANDOM_AUDITS": "1",
    "FOREPAGE_WORKER__ADMISSION_TIMEOUT_S": "3",
    "FOREPAGE_WORKER__KV_BYTES": str(32 << 20),
    "FOREPAGE_GATEWAY__WORKER_POLL_S": "0.2",
    "OMP_NUM_THREADS": "1",
}
"""Settings under which a short text is paged, and an outage is noticed soon."""


def code_of(num_functions: int) -> str:
    """A document, some thirty tokens a function."""
    return "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(num_functions))


class Once:
    """Does something at a chunk of an answer, and keeps how long the answer then stood still."""

    def __init__(self, act: Callable[[], None], *, at_chunk: int = 12) -> None:
        self._act = act
        self._at_chunk = at_chunk
        self._newest_s: float | None = None
        self.stood_still_s = 0.0

    def __call__(self, answer: Answer) -> None:
        now_s = time.monotonic()
        if self._newest_s is not None:
            self.stood_still_s = max(self.stood_still_s, now_s - self._newest_s)
            self._newest_s = now_s
        elif answer.num_chunks >= self._at_chunk:
            self._act()
            self._newest_s = time.monotonic()


def is_idle(stack: Stack, workers: Sequence[str], coldpool: str = "coldpool") -> bool:
    """Whether these workers and their cold pool hold nothing for anybody."""
    arena = stack.arena(coldpool)
    if (arena.leased, arena.writing) != (0, 0) or arena.free + arena.cached != arena.total:
        return False
    return all(
        (one.running, one.waiting, one.arena_slots_held) == (0, 0, 0)
        and (one.row_blocks_free, one.key_blocks_free, one.slots_free)
        == (one.row_blocks_total, one.key_blocks_total, one.max_running)
        for one in map(stack.worker, workers)
    )


def short_request(stack: Stack) -> httpx.Response:
    """What a request of one letter gets."""
    return httpx.post(
        f"{stack.url}/v1/completions",
        json={"model": "forepage-seeded", "prompt": "x", "max_tokens": 2},
        timeout=60,
    )


@dataclass
class Faulty:
    """The system, its question, the right answer, and for each worker a salt whose requests go there."""

    stack: Stack
    document: str
    num_tokens: int
    workers: tuple[str, ...] = ("worker",)
    truth: str = ""
    salts: dict[str, str] = field(default_factory=dict)

    def learn(self, *, mode: str) -> "Faulty":
        """Find the answer and the salts, while nothing is wrong."""
        for salt in "abcdefghijklmnop":
            servers: list[str] = []
            answer = self.ask(mode=mode, on_chunk=self._noting(servers), cache_salt=salt)
            self.salts.setdefault(servers[0], salt)
            self.truth = self.truth or answer.text
            assert self.is_right(answer)
            if len(self.salts) == len(self.workers):
                return self
        raise AssertionError("one worker gets everything")

    def ask(
        self,
        worker: str = "worker",
        *,
        mode: str = "exact",
        on_chunk: Callable[[Answer], None] | None = None,
        **fields: Any,
    ) -> Answer:
        """The question, by this worker while it serves."""
        return stream_chat(
            self.stack.url,
            [{"role": "user", "content": self.document}],
            mode=mode,
            budget_blocks=1,
            on_chunk=on_chunk,
            **{"max_tokens": self.num_tokens, "cache_salt": self.salts.get(worker, ""), **fields},
        )

    def is_right(self, answer: Answer) -> bool:
        """No token lost, none twice, none wrong."""
        counted = answer.usage.get("completion_tokens") == self.num_tokens
        return answer.error is None and answer.text == self.truth and counted

    def wait_served(self, worker: str = "worker", *, timeout_s: float = 60.0) -> float:
        """Until a request is answered rightly, by this very worker; how long that took."""
        began_s = time.monotonic()

        def is_served() -> bool:
            servers: list[str] = []
            try:
                answer = self.ask(worker, on_chunk=self._noting(servers))
            except (AssertionError, httpx.HTTPError):
                return False
            assert answer.error is not None or answer.text == self.truth, "a wrong answer"
            return self.is_right(answer) and servers == [worker]

        wait_until(is_served, timeout_s=timeout_s, what=f"{worker} serves")
        return time.monotonic() - began_s

    def wait_idle(self) -> None:
        """Until all workers of the one cold pool hold nothing."""
        what = "everything held is given back"
        wait_until(lambda: is_idle(self.stack, self.workers), timeout_s=30, what=what)

    def _noting(self, servers: list[str]) -> Once:
        return Once(lambda: servers.append(self._server()), at_chunk=5)

    def _server(self) -> str:
        """Which worker has a sequence."""
        stack = self.stack
        (name,) = [one for one in self.workers if not stack.has_ended(one) and stack.worker(one).running]
        return name
