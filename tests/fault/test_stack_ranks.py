"""A worker split over two processes: one arena between them, the promise of `exact`, and a rank that dies."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from rigs.chat import Answer, stream_chat
from rigs.stack import Stack, running_stack, wait_until

DOCUMENT = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(180))
MESSAGES = [{"role": "user", "content": DOCUMENT}]
FOLLOWER = b"forepage.worker.rank_follower"


def children(process_id: int) -> list[int]:
    """Processes that it started and that run."""
    text = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(child) for child in text.split()]


def followers(stack: Stack) -> list[int]:
    """The ranks beside rank 0."""
    started = children(stack.process_id("worker"))
    return [child for child in started if FOLLOWER in Path(f"/proc/{child}/cmdline").read_bytes()]


def arena_mappings(process_id: int, stack: Stack) -> set[tuple[str, str]]:
    """Device and inode of every mapping of the arena that may be written."""
    lines = Path(f"/proc/{process_id}/maps").read_text().splitlines()
    fields = [line.split() for line in lines if line.endswith(f"forepage-{stack.instance}-arena")]
    return {(device, inode) for _, access, _, device, inode, _ in fields if access.startswith("rw-s")}


def test_ranks_share_the_arena_and_their_loss_is_an_error(tmp_path: Path) -> None:
    settings = {
        "FOREPAGE_WORKER__TENSOR_PARALLEL": "2",
        "FOREPAGE_GATEWAY__RESUME_WAIT_S": "0",
        "OMP_NUM_THREADS": "1",
    }
    with running_stack(tmp_path, settings=settings) as stack:
        worker = stack.process_id("worker")
        (follower,) = followers(stack)
        (ours,) = arena_mappings(worker, stack)
        assert arena_mappings(follower, stack) == {ours}
        full, exact = (
            stream_chat(stack.url, MESSAGES, mode=mode, budget_blocks=1, max_tokens=80, cache_salt=mode)
            for mode in ("full", "exact")
        )
        assert full.error is None
        assert exact.text == full.text
        assert exact.forepage["demand_bytes"] > 0, "both ranks pulled rows"

        def kill_once(answer: Answer) -> None:
            if answer.num_chunks == 20 and answer.error is None:
                os.kill(follower, signal.SIGKILL)

        cut = stream_chat(stack.url, MESSAGES, mode="guarded", max_tokens=4000, on_chunk=kill_once)
        assert cut.num_chunks >= 20
        assert cut.error is not None
        assert cut.error["code"] == "dependency_unavailable"
        assert "rank" in cut.error["message"]
        wait_until(lambda: stack.has_ended("worker"), timeout_s=20, what="a worker without a rank ends")
        stack.start("worker")
        wait_until(lambda: is_answered(stack), timeout_s=20, what="a new worker answers")
        (follower,) = followers(stack)
        stack.kill("worker")
        wait_until(lambda: not is_alive(follower), timeout_s=10, what="a rank without rank 0 ends")
    assert stack.leftovers() == []


def is_answered(stack: Stack) -> bool:
    body = {"model": "forepage-seeded", "prompt": "x", "max_tokens": 2}
    return httpx.post(f"{stack.url}/v1/completions", json=body, timeout=30).status_code == 200


def is_alive(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_ranks_that_do_not_divide_stop_the_start_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="o_groups"),
        running_stack(tmp_path, settings={"FOREPAGE_WORKER__TENSOR_PARALLEL": "3"}),
    ):
        pass
