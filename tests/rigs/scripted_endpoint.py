"""A chat endpoint that answers with what it is told."""

import json
from typing import Any

import httpx

Body = dict[str, Any]


class ScriptedEndpoint:
    """Answers with what it is told; keeps every body."""

    def __init__(self, replies: dict[str, str] | None = None) -> None:
        self.replies = replies or {}
        self.bodies: list[Body] = []
        self.failures: list[httpx.Response | Exception] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        body: Body = json.loads(request.content)
        self.bodies.append(body)
        text = self.replies.get(body["messages"][-1]["content"], "no idea")
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "forepage": {"late_plans": 0}}
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}], "usage": usage})

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://fake/v1", transport=httpx.MockTransport(self))
