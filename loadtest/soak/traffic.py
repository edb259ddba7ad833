"""Requests of every kind, made from a seed: lengths, modes, streamed or whole, left half-way, or wrong."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx

from forepage.settings import ResidencyMode

LENGTHS = (3, 40, 200, 255, 256, 257, 700, 1500)
LENGTH_WEIGHTS = (40, 24, 6, 2, 2, 2, 1, 1)
NUM_DOCUMENTS = 4
"""Prompts are beginnings of so many texts: many share a prefix."""
ABORTED_SHARE, WRONG_SHARE, WHOLE_SHARE, CHECKED_SHARE = 0.2, 0.02, 0.15, 0.1
NUM_CHECKED = 8
BYTES = 256
"""Token ids below this are bytes in every tokenizer that comes with forepage."""


class Outcome(Enum):
    """How a request ended."""

    FINISHED = "finished"
    LEFT = "left by the client"
    REFUSED = "refused"
    FAILED = "failed"
    UNTYPED = "an error without a type"


@dataclass(frozen=True)
class Asked:
    """One request. `leave_after` chunks the client goes away; `checked` is the number of its known answer."""

    prompt: tuple[int, ...]
    max_tokens: int
    mode: ResidencyMode
    is_streamed: bool = True
    leave_after: int | None = None
    is_wrong: bool = False
    checked: int | None = None

    def body(self, model: str) -> dict[str, Any]:
        """The HTTP body: greedy, to the last token that was asked for."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.is_streamed,
            "forepage": {"mode": self.mode.value, "budget_blocks": 0 if self.is_wrong else 2},
            **({"stream_options": {"include_usage": True}} if self.is_streamed else {}),
        }


@dataclass
class Answered:
    """What came of it; times in seconds since it was sent."""

    asked: Asked
    outcome: Outcome = Outcome.UNTYPED
    text: str = ""
    num_tokens: int = 0
    status: int = 0
    retry_after: str | None = None
    error: str = ""
    first_s: float | None = None
    newest_s: float = 0.0
    longest_gap_s: float = 0.0


def mixed(count: int, seed: int, answer_scale: int = 1) -> Iterator[Asked]:
    """So many requests of every kind; answers are long in proportion to `answer_scale`."""
    chance = random.Random(seed)
    for _ in range(count):
        if chance.random() < CHECKED_SHARE:
            number = chance.randrange(NUM_CHECKED)
            yield known(number, chance.choice([ResidencyMode.FULL, ResidencyMode.EXACT]))
            continue
        max_tokens = answer_scale * chance.choice((1, 2, 4, 8, 16))
        leaves = chance.random() < ABORTED_SHARE
        (length,) = chance.choices(LENGTHS, LENGTH_WEIGHTS)
        yield Asked(
            prompt=_prompt(chance.randrange(NUM_DOCUMENTS), length, chance.randrange(50)),
            max_tokens=max_tokens,
            mode=chance.choice(list(ResidencyMode)),
            is_streamed=leaves or chance.random() >= WHOLE_SHARE,
            leave_after=chance.randrange(max_tokens) if leaves else None,
            is_wrong=not leaves and chance.random() < WRONG_SHARE,
        )


def alike(seed: int) -> Iterator[Asked]:
    """Requests that cost about the same, to compare rates; as many as are taken."""
    chance = random.Random(seed)
    while True:
        prompt = _prompt(chance.randrange(NUM_DOCUMENTS), 200, chance.randrange(50))
        yield Asked(prompt, 24, ResidencyMode.GUARDED)


def known(number: int, mode: ResidencyMode) -> Asked:
    """A request that is asked again and again, and must be answered alike."""
    return Asked(_prompt(NUM_DOCUMENTS + number, 40 + 97 * number, 0), 12, mode, checked=number)


def _prompt(document: int, length: int, branch: int) -> tuple[int, ...]:
    """Beginnings of one text, but for their last ten tokens."""
    text = random.Random(document)
    words = [" block", " entry", " page", " is", " read", " ahead", " of", " need", ".\n"]
    data = "".join(text.choices(words, k=length)).encode()
    return (*data[: max(0, length - 10)], *f"{branch:>10}".encode()[-min(10, length) :])


async def ask(client: httpx.AsyncClient, asked: Asked, model: str) -> Answered:
    """Send it and read to its end, or until the client leaves. Never raises."""
    answered = Answered(asked)
    sent_s = time.monotonic()
    try:
        if asked.is_streamed:
            await _stream(client, asked, model, answered, sent_s)
        else:
            reply = await client.post("/v1/completions", json=asked.body(model))
            _refusal(answered, reply) if reply.status_code != 200 else _whole(answered, reply.json())
    except httpx.HTTPError as error:
        answered.outcome, answered.error = Outcome.UNTYPED, repr(error)
    return answered


async def _stream(
    client: httpx.AsyncClient, asked: Asked, model: str, answered: Answered, sent_s: float
) -> None:
    async with client.stream("POST", "/v1/completions", json=asked.body(model)) as reply:
        if reply.status_code != 200:
            await reply.aread()
            _refusal(answered, reply)
            return
        num_chunks = 0
        async for event in _events(reply):
            if "error" in event:
                answered.outcome, answered.error = Outcome.FAILED, str(event["error"].get("code") or "")
                return
            if event.get("usage"):
                answered.num_tokens = event["usage"]["completion_tokens"]
                answered.outcome = Outcome.FINISHED
            elif event["choices"] and event["choices"][0]["finish_reason"] is None:
                num_chunks += 1
                answered.text += event["choices"][0]["text"]
                _arrive(answered, time.monotonic() - sent_s)
            if asked.leave_after is not None and num_chunks > asked.leave_after:
                answered.outcome = Outcome.LEFT
                return


async def _events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _arrive(answered: Answered, now_s: float) -> None:
    if answered.first_s is None:
        answered.first_s = now_s
    else:
        answered.longest_gap_s = max(answered.longest_gap_s, now_s - answered.newest_s)
    answered.newest_s = now_s


def _whole(answered: Answered, reply: dict[str, Any]) -> None:
    answered.outcome = Outcome.FINISHED
    answered.text = reply["choices"][0]["text"]
    answered.num_tokens = reply["usage"]["completion_tokens"]


def _refusal(answered: Answered, reply: httpx.Response) -> None:
    answered.status = reply.status_code
    answered.retry_after = reply.headers.get("retry-after")
    try:
        answered.error = str(reply.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        answered.outcome, answered.error = Outcome.UNTYPED, reply.text[:200]
        return
    answered.outcome = Outcome.REFUSED if reply.status_code in (429, 503) else Outcome.FAILED


async def closed_loop(
    client: httpx.AsyncClient, requests: Iterator[Asked], model: str, *, concurrency: int
) -> list[Answered]:
    """So many clients, each sends its next request when the last one has ended."""
    answers: list[Answered] = []

    async def one_client() -> None:
        for asked in requests:
            answers.append(await ask(client, asked, model))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_client())
    return answers


async def open_loop(
    client: httpx.AsyncClient, requests: Iterable[Asked], model: str, *, rate: float
) -> list[Answered]:
    """Requests arrive at this rate (1/s), whatever becomes of those before; nobody asks twice."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        asking = []
        for number, asked in enumerate(requests):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.monotonic()))
            asking.append(tasks.create_task(ask(client, asked, model)))
    return [task.result() for task in asking]
