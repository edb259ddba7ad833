"""The lookahead index dies in the middle of a stream: the stream still ends in tokens, and says so."""

import secrets
from pathlib import Path

from forepage.telemetry import Attr, SpanName
from rigs.chat import Answer, stream_chat
from rigs.otlp import receiving_spans
from rigs.stack import running_stack, wait_until

DOCUMENT = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(180))


def test_killed_index_mid_stream_falls_back_and_says_so(tmp_path: Path) -> None:
    trace_id = secrets.token_bytes(16)
    is_killed = False
    with receiving_spans() as (spans, endpoint), running_stack(tmp_path, otlp=endpoint) as stack:

        def kill_once(answer: Answer) -> None:
            nonlocal is_killed
            if not is_killed and answer.num_chunks >= 40:
                is_killed = True
                stack.kill("index")

        answer = stream_chat(
            stack.url,
            [{"role": "user", "content": DOCUMENT}],
            mode="guarded",
            budget_blocks=4,
            max_tokens=300,
            headers={"traceparent": f"00-{trace_id.hex()}-{secrets.token_hex(8)}-01"},
            on_chunk=kill_once,
        )
        assert is_killed
        assert answer.error is None
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == 300
        report = answer.forepage
        assert report["index_down_intervals"] >= 1
        assert report["intervals"] > report["index_down_intervals"], "it was up before"

        def is_told() -> bool:
            return any(
                span.name == SpanName.INTERVAL and span.attributes.get(Attr.FALLBACK) == "index_down"
                for span in spans.trace(trace_id)
            )

        wait_until(is_told, timeout_s=10, what="the fallback in a span")
        stack.start("index")

        def is_used_again() -> bool:
            again = stream_chat(
                stack.url,
                [{"role": "user", "content": DOCUMENT}],
                mode="guarded",
                budget_blocks=4,
                max_tokens=80,
            )
            report = again.forepage
            return int(report["intervals"]) > 0 and report["index_down_intervals"] == 0

        wait_until(is_used_again, timeout_s=30, what="a restarted index is used again")
    assert stack.leftovers() == []
