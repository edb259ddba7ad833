"""A wrong field of a request is a 400 that names it, echoes nothing, and reaches no worker."""

import json
from typing import Any

import pytest

from rigs.fake_worker import MODEL, StartWorker
from rigs.gateways import JSON, SECRET, OpenGateway, chat, error_of

USER = {"role": "user", "content": "x"}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def calling(*ids: str, arguments: str = "{}") -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids or ("a",)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": SECRET}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "x"}, USER]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}, USER]}, "messages[0].role"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}, USER]}, "messages[0].tool_calls[0].id"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages[1].role"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool('a"b')]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
        ({"tools": [tool("f", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", description="\ud800")]}, "tools[0].function"),
        ({"tools": [tool("f")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": ["f"]}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [5, 100_000]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"reasoning_effort": "max"}, "reasoning_effort"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, "reasoning_effort"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"thinking": True}}, "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking": "yes"}}, "chat_template_kwargs.thinking"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"messages": [{**USER, "task": "query"}]}, "messages[0].task"),
        ({"messages": [{**USER, "task": "sing"}]}, "messages[0].task"),
        ({"messages": [USER, calling(), USER]}, "messages[1].tool_calls"),
        ({"messages": [USER, calling()]}, "messages[1].tool_calls"),
        ({"messages": [USER, calling("a", "a")]}, "messages[1].tool_calls"),
        ({"messages": [USER, calling(), result("b")]}, "messages[2].tool_call_id"),
        ({"messages": [USER, calling(), result("a"), result("a")]}, "messages[3].tool_call_id"),
        ({"messages": [USER, calling("a", "b"), result("a"), USER]}, "messages[1].tool_calls"),
        ({"messages": [{**USER, "tool_calls": calling()["tool_calls"]}]}, "messages[0].tool_calls"),
        (
            {"messages": [calling(arguments="[]"), result("a")]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [calling(arguments='{"a"'), result("a")]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [calling(arguments='{"a": "\\ud800"}'), result("a")]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"functions": [{}]}, "functions"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.01}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"priority": 2**31}, "priority"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"forepage": []}, "forepage"),
        ({"forepage": {"mode": "fast"}}, "forepage.mode"),
        ({"forepage": {"min_recall": 1.5}}, "forepage.min_recall"),
        ({"forepage": {"budget_blocks": 0}}, "forepage.budget_blocks"),
        ({"forepage": {"min_recal": 0.5}}, "forepage.min_recal"),
    ],
    ids=str,
)
async def test_wrong_chat_field_is_named(
    start_worker: StartWorker, open_gateway: OpenGateway, fields: dict[str, Any], param: str
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    content = json.dumps(chat(SECRET, **fields))  # ASCII: a lone surrogate stays one
    reply = await gateway.client.post("/v1/chat/completions", content=content, headers=JSON)
    error = error_of(reply)
    assert reply.status_code == 400
    assert error["param"] == param
    assert error["type"] == error["code"] == "invalid_request_error"
    assert worker.requests == []
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, 2, 320]}, "prompt[2]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
    ],
    ids=str,
)
async def test_wrong_completion_field_is_named(
    start_worker: StartWorker, open_gateway: OpenGateway, fields: dict[str, Any], param: str
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post("/v1/completions", json={"model": MODEL, **fields})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param
