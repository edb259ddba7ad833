"""What an answer can be asked to be: JSON, a call, penalised, with log-probabilities, several of them."""

import json
import math
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionToolParam

from rigs.traced import Traced

MODEL = "forepage-seeded"
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "no"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["answer", "count"],
    "additionalProperties": False,
}


def client(traced: Traced) -> OpenAI:
    return OpenAI(base_url=f"{traced.stack.url}/v1", api_key="none", max_retries=0)


def test_a_json_answer_keeps_to_its_schema(traced: Traced) -> None:
    """The model is random: only the constraint can make this JSON."""
    with client(traced) as openai:
        answer = openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Well?"}],
            max_tokens=100,
            seed=5,
            response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}},
        )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content or "")
    assert value["answer"] in ("yes", "no")
    assert 0 <= value["count"] <= 9


GAUGE: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "gauge", "description": "reads a gauge", "parameters": SCHEMA},
}


def read_call(answer: ChatCompletion) -> dict[str, Any]:
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "gauge"
    arguments: dict[str, Any] = json.loads(call.function.arguments)
    return arguments


def test_a_forced_call_comes_and_its_arguments_fit(traced: Traced) -> None:
    with client(traced) as openai:
        answer = openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Well?"}],
            max_tokens=400,
            seed=5,
            tools=[GAUGE],
            tool_choice={"type": "function", "function": {"name": "gauge"}},
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    arguments = read_call(answer)
    assert arguments["answer"] in ("yes", "no")
    assert 0 <= arguments["count"] <= 9
    assert answer.usage is not None
    assert (answer.usage.model_extra or {})["forepage"] is not None


def test_a_tool_whose_schema_is_none_is_refused(traced: Traced) -> None:
    broken: ChatCompletionToolParam = {
        "type": "function",
        "function": {"name": "gauge", "parameters": {"properties": {"a": {"type": "wizard"}}}},
    }
    with client(traced) as openai, pytest.raises(BadRequestError) as refused:
        openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Well?"}],
            tools=[broken],
            tool_choice="required",
        )
    assert refused.value.param == "tools"


def test_logprobs_are_those_of_the_tokens(traced: Traced) -> None:
    with client(traced) as openai:
        answer = openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=5,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for item in logprobs.content:
        assert item.logprob <= 0
        assert [top.logprob for top in item.top_logprobs] == sorted(
            (top.logprob for top in item.top_logprobs), reverse=True
        )
        assert math.isclose(item.logprob, item.top_logprobs[0].logprob), "greedy takes the likeliest"


def test_a_penalty_changes_the_answer_and_several_choices_differ(traced: Traced) -> None:
    def texts(penalty: float = 0.0) -> list[str | None]:
        with client(traced) as openai:
            answer = openai.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=40,
                seed=1,
                n=2,
                presence_penalty=penalty,
                frequency_penalty=penalty,
            )
        return [choice.message.content for choice in answer.choices]

    plain = texts()
    assert len(set(plain)) == 2
    assert plain == texts(), "the seed decides"
    assert texts(penalty=2.0) != plain
