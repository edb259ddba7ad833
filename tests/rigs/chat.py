"""A client for tests: streams a chat completion and keeps text, usage and what the stream said."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 240.0


@dataclass
class Answer:
    """What a stream gave."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    num_chunks: int = 0

    @property
    def forepage(self) -> dict[str, Any]:
        """`usage.forepage`."""
        report: dict[str, Any] = self.usage["forepage"]
        return report


def stream_chat(
    url: str,
    messages: list[dict[str, str]],
    *,
    mode: str,
    budget_blocks: int = 8,
    max_tokens: int = 160,
    headers: dict[str, str] | None = None,
    on_chunk: Callable[[Answer], None] | None = None,
    **fields: Any,
) -> Answer:
    """POST and read to the end; `on_chunk` runs after each chunk of text."""
    body: dict[str, Any] = {
        "model": "forepage-seeded",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "forepage": {"mode": mode, "budget_blocks": budget_blocks},
        **fields,
    }
    answer = Answer()
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT_S
    ) as response:
        if response.status_code != 200:
            response.read()
            raise AssertionError(f"{response.status_code}: {response.text}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            _take(answer, json.loads(line.removeprefix("data: ")))
            if on_chunk is not None:
                on_chunk(answer)
    return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event["error"]
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        answer.text += choice["delta"].get("content") or ""
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        answer.num_chunks += 1
