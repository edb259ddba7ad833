"""Event streams: OpenAI's chunks in order, usage when asked, errors as the last event."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import ANSWER, MODEL, StartWorker, answer, endless, finished, started, tokens
from rigs.gateways import OpenGateway, chat, events_of, until


async def test_chat_stream_is_role_text_reason_done(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post("/v1/chat/completions", json=chat(stream=True))
    *chunks, done = events_of(reply)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == ANSWER
    assert "\ufffd" not in reply.text
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_usage_comes_last_when_asked(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    body = chat(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events_of(await gateway.client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ANSWER.encode())
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert last["usage"]["forepage"]["mode_final"] == "exact"


async def test_completion_stream(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 10}
    *chunks, _ = events_of(await gateway.client.post("/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER[:10]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_stop_string_never_shows(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        for byte in b"one<st<stop>two":
            yield tokens([byte])
        async for event in endless(request):
            yield event

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    body = chat(stream=True, stop="<stop>", stream_options={"include_usage": True})
    reply = await gateway.client.post("/v1/chat/completions", json=body)
    *chunks, end, usage, _ = events_of(reply)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "one<st"
    assert end["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == len("one<st<stop>")
    assert usage["usage"]["forepage"] is None
    await until(lambda: worker.cancelled == 1)


async def test_text_held_for_a_stop_string_is_shown_at_the_end(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield tokens(b"text<sto")
        yield finished(request, 8)

    gateway = await open_gateway(await start_worker(script=script))
    *chunks, _, _ = events_of(
        await gateway.client.post("/v1/chat/completions", json=chat(stream=True, stop="<stop>"))
    )
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "text<sto"


async def test_failure_inside_a_stream_is_its_last_event(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield tokens(b"abc")
        yield pb.GenerateEvent(failed=pb.Failed(code="capacity_exhausted", message="no room"))

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post("/v1/chat/completions", json=chat(stream=True))
    assert reply.status_code == 200
    *chunks, last = events_of(reply)
    assert chunks[-1]["choices"][0]["delta"] == {"content": "abc"}
    error = {"message": "no room", "type": "server_error", "param": None, "code": "capacity_exhausted"}
    assert last == {"error": error | {"request_id": reply.headers["x-request-id"]}}


async def test_worker_death_inside_a_stream_is_its_last_event(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(script=endless)
    gateway = await open_gateway(worker, resume_wait_s=0)
    asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=chat(stream=True)))
    await until(lambda: len(worker.requests) == 1)
    await worker.stop()
    *_, last = events_of(await asking)
    assert last["error"]["code"] == "dependency_unavailable"
    assert gateway.admission.running == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_refusal_before_a_stream_is_plain_http(
    start_worker: StartWorker, open_gateway: OpenGateway, path: str
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        if request.sampling.max_tokens == 3:
            yield pb.GenerateEvent(failed=pb.Failed(code="rate_limit_exceeded", message="full"))
        async for event in answer(request):
            yield event

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post(path, json=chat(prompt="x", stream=True, max_tokens=3))
    assert reply.status_code == 429
    assert reply.json()["error"]["message"] == "full"
    assert reply.headers["retry-after"] == "1"
