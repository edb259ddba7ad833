"""One OpenAI-compatible chat endpoint: ask, wait and ask again when it is busy, say why when it fails."""

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx

from loadtest.quality.items import Item

BUSY = (429, 503)
MAX_TRIES = 8
MAX_WAIT_S = 60.0
MODEL_WAIT_S, MODEL_POLL_S = 60.0, 0.5
"""A gateway answers before its worker is there."""


@dataclass(frozen=True)
class Reply:
    """What came back; `error` says why nothing did."""

    text: str
    usage: dict[str, Any]
    error: str | None = None


class Endpoint:
    """Chats with one model, greedily and without thinking."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        """`client` has the base URL, with the `/v1`."""
        self._client = client
        self.model = model

    async def ask(self, item: Item, forepage: dict[str, Any] | None) -> Reply:
        """One answer; `forepage` None asks an endpoint that does not know the field."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": turn.text} for turn in item.turns],
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        if forepage is not None:
            body["forepage"] = forepage
        failure = "never tried"
        for attempt in range(MAX_TRIES):
            try:
                response = await self._client.post("chat/completions", json=body)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
                await asyncio.sleep(_wait_s(None, attempt))
                continue
            if response.status_code == httpx.codes.OK:
                return _reply(response.json())
            failure = f"{response.status_code}: {response.text[:300]}"
            if response.status_code not in BUSY:
                break
            await asyncio.sleep(_wait_s(response.headers.get("retry-after"), attempt))
        return Reply("", {}, failure)


async def first_model(client: httpx.AsyncClient) -> str:
    """The first model that the endpoint names; waits while it names none, as before its worker is there.

    Raises: httpx.HTTPError, TimeoutError after MODEL_WAIT_S.
    """
    async with asyncio.timeout(MODEL_WAIT_S):
        while True:
            response = await client.get("models")
            response.raise_for_status()
            if models := response.json()["data"]:
                return str(models[0]["id"])
            await asyncio.sleep(MODEL_POLL_S)


def _reply(body: dict[str, Any]) -> Reply:
    message = body["choices"][0]["message"]
    return Reply(message.get("content") or "", body.get("usage") or {})


def _wait_s(retry_after: str | None, attempt: int) -> float:
    """What the server asks for, else twice as long each time."""
    if retry_after is not None and retry_after.isdigit():
        return min(float(retry_after), MAX_WAIT_S)
    return min(0.25 * 2.0**attempt, MAX_WAIT_S)
