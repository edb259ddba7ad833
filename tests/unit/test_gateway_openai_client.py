"""The client our users have: OpenAI's own, against the served gateway."""

import json
from collections.abc import AsyncIterator

import openai
import pydantic
import pytest

from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import ANSWER, MODEL, FakeWorker, StartWorker, answer, finished, saying, scored, started
from rigs.gateway_thread import gateway_thread
from rigs.gateways import ServeGateway

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


TOOL: openai.types.chat.ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'  # noqa: RUF001
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'  # noqa: RUF001
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'  # noqa: RUF001
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"  # noqa: RUF001
)


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_chat_completions_and_models(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"forepage": {"mode": "guarded"}, "top_k": 5}
        )
        assert chat.choices[0].message.content == ANSWER
        assert chat.choices[0].finish_reason == "stop"
        assert chat.usage is not None
        assert chat.usage.prompt_tokens_details is not None
        assert chat.usage.prompt_tokens_details.cached_tokens == 2
        assert chat.usage.model_extra is not None
        assert chat.usage.model_extra["forepage"]["mode_final"] == "exact"
        text = await client.completions.create(model=MODEL, prompt="x", max_tokens=5)
        assert text.choices[0].text == ANSWER[:5]
        assert text.choices[0].finish_reason == "length"
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_streams(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        ]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(ANSWER.encode())
        pieces = [
            piece.choices[0].text
            async for piece in await client.completions.create(model=MODEL, prompt="x", stream=True)
        ]
        assert "".join(pieces) == ANSWER


async def test_tools_and_reasoning(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    gateway = await serve_gateway(await start_worker(script=saying(f"Hm.</think>Wait.{CALLS}", width=2)))
    async with client_of(gateway.url) as client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=[TOOL], reasoning_effort="high"
        )
        message = whole.choices[0].message
        assert message.model_extra == {"reasoning_content": "Hm."}
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris", "days": 3}')
        async with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=[TOOL], reasoning_effort="high"
        ) as stream:
            streamed = await stream.get_final_completion()
        final = streamed.choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.content == "Wait."
        assert final.message.tool_calls is not None
        assert final.message.tool_calls[0].function.parsed_arguments == {"city": "Paris", "days": 3}
        follow_up: list[openai.types.chat.ChatCompletionMessageParam] = [
            *MESSAGES,
            {
                "role": "assistant",
                "content": message.content,
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": call.function.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        again = await client.chat.completions.create(model=MODEL, messages=follow_up, tools=[TOOL])
        assert again.choices[0].finish_reason == "tool_calls"


async def test_choices_and_logprobs(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield scored(request, [65, 66])
        yield finished(request, 2)

    gateway = await serve_gateway(await start_worker(script=script))
    async with client_of(gateway.url) as client:
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=1
        )
        for choice in chat.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert [entry.token for entry in choice.logprobs.content] == ["A", "B"]
            assert choice.logprobs.content[1].top_logprobs[0].logprob == -1.0
        text = await client.completions.create(model=MODEL, prompt="x", logprobs=1)
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.tokens == ["A", "B"]


async def test_streamed_choices_and_logprobs(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        for token in (65, 66):
            yield scored(request, [token])
        yield finished(request, 2)

    gateway = await serve_gateway(await start_worker(script=script))
    shown: dict[int, list[str]] = {0: [], 1: []}
    async with client_of(gateway.url) as client:
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, stream=True
        ):
            for choice in chunk.choices:
                scores = choice.logprobs.content if choice.logprobs is not None else None
                shown[choice.index] += [entry.token for entry in scores or ()]
                assert all(len(entry.top_logprobs) == 2 for entry in scores or ())
    assert shown == {0: ["A", "B"], 1: ["A", "B"]}


async def test_stop_and_seed(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    worker = await start_worker()
    gateway = await serve_gateway(worker)
    async with client_of(gateway.url) as client:
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stop=["42"], seed=11, n=2, extra_body={"priority": -1}
        )
    assert [choice.message.content for choice in chat.choices] == ["The answer is "] * 2
    assert {choice.finish_reason for choice in chat.choices} == {"stop"}
    assert sorted(request.sampling.seed for request in worker.requests) == [11, 12]
    assert {request.priority for request in worker.requests} == {-1}


class Forecast(pydantic.BaseModel):
    """What the client wants to be told."""

    city: str
    days: int


async def test_json_mode_and_schemas(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    said = '{"city": "Paris", "days": 3}'
    worker = await start_worker(script=saying(said))
    gateway = await serve_gateway(worker)
    async with client_of(gateway.url) as client:
        free = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}
        )
        assert free.choices[0].message.content == said
        parsed = await client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Forecast)
        assert parsed.choices[0].message.parsed == Forecast(city="Paris", days=3)
        async with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, response_format=Forecast
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == Forecast(city="Paris", days=3)
    schemas = [json.loads(request.sampling.json_schema) for request in worker.requests]
    assert schemas[0] == {}
    for schema in schemas[1:]:
        assert schema["properties"].keys() == {"city", "days"}
        assert schema["additionalProperties"] is False, "the answer is bound to what is parsed"


async def test_a_cut_answer_is_not_parsed(start_worker: StartWorker, serve_gateway: ServeGateway) -> None:
    gateway = await serve_gateway(await start_worker(script=saying('{"city": "Pa', reason="LENGTH")))
    async with client_of(gateway.url) as client:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Forecast)


def test_the_client_without_an_event_loop() -> None:
    """Whole, in a stream, calls in a stream, plain completions, models, and an error."""
    with (
        gateway_thread(lambda: FakeWorker(script=saying(f"Wait.{CALLS}", width=2))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL])
        assert whole.choices[0].message.tool_calls is not None
        with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
        assert "content.delta" in kinds
        assert "tool_calls.function.arguments.done" in kinds
        assert final.message.content == "Wait."
        assert final.message.tool_calls is not None
        assert final.message.tool_calls[0].function.parsed_arguments == {"city": "Paris", "days": 3}
        pieces = client.completions.create(model=MODEL, prompt=[104, 105], stream=True)
        assert "".join(piece.choices[0].text for piece in pieces).startswith("Wait.")
        assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=MODEL, messages=[])


async def test_errors_are_the_clients_own_types(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker(), max_body_bytes=2000)
    async with client_of(gateway.url) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model=MODEL, messages=MESSAGES, temperature=3)
        assert (bad.value.param, bad.value.code) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as long:
            await create(model=MODEL, messages=MESSAGES, max_tokens=5000)
        assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="other", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.APIStatusError) as large:
            await create(model=MODEL, messages=[{"role": "user", "content": "x" * 5000}])
        assert large.value.status_code == 413
        assert large.value.request_id


async def test_error_inside_a_stream_is_raised(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        async for event in answer(request):
            if event.WhichOneof("event") == "finished":
                yield pb.GenerateEvent(failed=pb.Failed(code="integrity_error", message="damaged"))
            yield event

    gateway = await serve_gateway(await start_worker(script=script))
    async with client_of(gateway.url) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="damaged") as caught:
            _ = [chunk async for chunk in stream]
        assert caught.value.code == "integrity_error"
