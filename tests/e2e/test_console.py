"""`forepage status` and `forepage trace` against real processes, as somebody types them."""

import json
import secrets
import subprocess
import sys

from rigs.chat import stream_chat
from rigs.stack import Stack, wait_until
from rigs.traced import Traced


def forepage(stack: Stack, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "forepage", *arguments]
    done = subprocess.run(
        command, env=dict(stack.environ), capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_status_finds_every_process(traced: Traced) -> None:
    code, output = forepage(traced.stack, "status", "--json")
    found = json.loads(output)
    assert code == 0, output
    assert {process["role"] for process in found["processes"]} == {"gateway", "index", "coldpool", "worker"}
    assert found["models"] == ["forepage-seeded"]
    assert found["arena"]["bytes"] >= 64 << 20
    assert found["workers"][0]["described"]["row_blocks_total"] > 0


def test_trace_draws_a_request_from_what_the_processes_kept(traced: Traced, document: str) -> None:
    request_id = f"console-{secrets.token_hex(4)}"
    answer = stream_chat(
        traced.stack.url,
        [{"role": "user", "content": document[:6000]}],
        mode="lookahead",
        max_tokens=72,
        headers={"x-request-id": request_id},
    )
    assert answer.finish_reason == "length"
    drawn = ""

    def is_drawn() -> bool:
        nonlocal drawn
        code, drawn = forepage(traced.stack, "trace", request_id)
        return code == 0 and "worker.generate" in drawn and "gateway.request" in drawn

    wait_until(is_drawn, timeout_s=30, what="the trace in the terminal")
    for name in (
        "worker.prefill",
        "worker.decode",
        "lookahead.interval",
        "index.lookahead",
        "coldpool.reserve",
    ):
        assert name in drawn
    for phase in ("predict", "load", "wait", "commit"):
        assert f"lookahead.{phase}" in drawn
    code, listed = forepage(traced.stack, "trace")
    assert code == 0
    assert request_id in listed
