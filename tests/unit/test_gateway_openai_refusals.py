"""OpenAI's own client and our errors, limits and deadlines; a client that leaves frees everything."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from forepage.gateway.api_keys import new_key
from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import ANSWER, MODEL, StartWorker, answer, endless, silent
from rigs.gateways import DEADLINE_S, ServeGateway, key_file, until

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


def client_of(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def body_of(error: openai.APIError) -> dict[str, str | None]:
    """What is inside `error` of the answer."""
    return cast(dict[str, str | None], error.body)


async def until_idle(url: str) -> None:
    """Until the gateway runs no request."""
    async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(DEADLINE_S):
        while True:
            if not (await client.get("/load")).json()["running"]:
                return
            await asyncio.sleep(0.01)


async def ask(client: openai.AsyncOpenAI, *, stream: bool, timeout_s: float) -> None:
    """To the end of the answer."""
    body = {"timeout_s": timeout_s}
    create = client.chat.completions.create
    if stream:
        async for _ in await create(model=MODEL, messages=MESSAGES, stream=True, extra_body=body):
            pass
    else:
        await create(model=MODEL, messages=MESSAGES, extra_body=body)


async def test_a_missing_key_is_an_authentication_error(
    start_worker: StartWorker, serve_gateway: ServeGateway, tmp_path: Path
) -> None:
    key, kept = new_key("ours")
    gateway = await serve_gateway(await start_worker(), api_keys=key_file(tmp_path, kept))
    for stream in (False, True):
        async with client_of(gateway.url) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
        assert refused.value.code == "invalid_api_key"
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
    async with client_of(gateway.url, key) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_a_limit_is_a_rate_limit_error_that_says_when_to_come_back(
    start_worker: StartWorker, serve_gateway: ServeGateway, tmp_path: Path
) -> None:
    key, kept = new_key("ours", requests_per_minute=1)
    gateway = await serve_gateway(await start_worker(), api_keys=key_file(tmp_path, kept))
    async with client_of(gateway.url, key) as client:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "rate_limit_error"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


async def test_the_clients_own_retries_wait_as_long_as_we_say(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    async def full_once(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        if len(worker.requests) == 1:
            yield pb.GenerateEvent(
                failed=pb.Failed(code="capacity_exhausted", message="full", retry_after_s=1)
            )
            return
        async for event in answer(request):
            yield event

    worker = await start_worker(script=full_once)
    gateway = await serve_gateway(worker)
    async with client_of(gateway.url).with_options(max_retries=1) as client:
        asked_s = time.monotonic()
        reply = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert time.monotonic() - asked_s >= 1.0, "by itself it waits half a second at most"
    assert reply.choices[0].message.content == ANSWER
    assert len(worker.requests) == 2


async def test_what_is_not_there_is_a_not_found_error_that_says_what_is(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        with pytest.raises(openai.NotFoundError, match="embeddings"):
            await client.embeddings.create(model=MODEL, input="x")
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            await client.responses.create(model=MODEL, input="x")
        with pytest.raises(openai.NotFoundError, match="/v1/models") as unknown:
            await client.models.retrieve("org/other")
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        card = await client.models.retrieve(MODEL)
        assert (card.id, card.object) == (MODEL, "model")


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
NO_TEXT_ALONE = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": NO_TEXT_ALONE}, "messages[0].content[1].type", "sees no images"),
        ({"messages": [{"role": "user", "content": [SOUND]}]}, "messages[0].content[0].type", "audio"),
        ({"modalities": ["text", "audio"]}, "modalities", "text alone"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "leave it out"),
        ({"web_search_options": {}}, "web_search_options", "nothing is searched"),
    ],
    ids=["image", "sound", "modalities", "audio", "search"],
)
async def test_what_is_not_text_is_refused_with_the_reason(
    start_worker: StartWorker, serve_gateway: ServeGateway, fields: dict[str, Any], param: str, said: str
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})
    assert refused.value.param == param
    assert said in str(body_of(refused.value)["message"])


async def test_fields_that_ask_for_text_alone_are_taken(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        answered = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, modalities=["text"], audio=None, reasoning_effort="minimal"
        )
    assert answered.choices[0].message.content == ANSWER


async def test_without_a_worker_it_is_a_server_error(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker()
    gateway = await serve_gateway(worker)
    await worker.stop()
    async with client_of(gateway.url) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (refused.value.status_code, refused.value.code) == (503, "dependency_unavailable")
    assert int(refused.value.response.headers["retry-after"]) >= 1


async def test_answers_and_errors_name_the_request(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with client_of(gateway.url) as client:
        create = client.chat.completions.with_raw_response.create
        raw = await create(model=MODEL, messages=MESSAGES, extra_headers={"x-request-id": "mine-7"})
        assert (raw.status_code, raw.headers["x-request-id"], raw.request_id) == (200, "mine-7", "mine-7")
        assert raw.parse().choices[0].finish_reason == "stop"
        async with client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=MESSAGES, stream=True
        ) as streamed:
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert streamed.headers["x-request-id"]
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model=MODEL, messages=MESSAGES, n=9)
    assert bad.value.request_id
    assert body_of(bad.value)["request_id"] == bad.value.request_id


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_is_a_server_error_that_names_it(
    start_worker: StartWorker, serve_gateway: ServeGateway, stream: bool
) -> None:
    worker = await start_worker(script=silent)
    gateway = await serve_gateway(worker)
    async with client_of(gateway.url) as client:
        with pytest.raises(openai.APIError, match="timeout_s") as late:
            await ask(client, stream=stream, timeout_s=0.2)
    assert late.value.code == "deadline_exceeded"
    assert body_of(late.value)["request_id"]
    assert isinstance(late.value, openai.InternalServerError) is not stream, "in a stream the status is out"
    await until(lambda: worker.cancelled == 1)
    await until_idle(gateway.url)


async def test_a_client_that_times_out_frees_the_worker(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    worker = await start_worker(script=silent)
    gateway = await serve_gateway(worker)
    async with client_of(gateway.url).with_options(timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    await until(lambda: worker.cancelled == len(worker.requests))
    await until_idle(gateway.url)


async def test_closing_a_stream_frees_the_worker_the_gateway_and_the_key(
    start_worker: StartWorker, serve_gateway: ServeGateway, tmp_path: Path
) -> None:
    """Each has room for one request: a second is answered only if the first holds nothing."""
    key, kept = new_key("one", max_concurrent=1)
    worker = await start_worker(script=endless)
    gateway = await serve_gateway(worker, max_concurrent_requests=1, api_keys=key_file(tmp_path, kept))
    async with client_of(gateway.url, key) as client:
        for turn in range(1, 4):
            async with asyncio.timeout(DEADLINE_S):
                stream = await open_stream(client)
            assert [(await anext(stream)).object for _ in range(5)] == ["chat.completion.chunk"] * 5
            assert worker.cancelled == turn - 1
            await stream.close()
            await until(lambda turn=turn: worker.cancelled == turn)  # type: ignore[misc]


async def open_stream(
    client: openai.AsyncOpenAI,
) -> openai.AsyncStream[openai.types.chat.ChatCompletionChunk]:
    """As soon as there is room for it."""
    while True:
        try:
            return await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        except openai.RateLimitError:
            await asyncio.sleep(0.01)
