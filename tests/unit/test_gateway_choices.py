"""Several answers to one request, and log-probabilities: OpenAI's objects from the worker's."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import ANSWER, MODEL, StartWorker, endless, finished, saying, scored, started, tokens
from rigs.gateways import OpenGateway, chat, events_of, until

PATHS = ["/v1/chat/completions", "/v1/completions"]


async def by_seed(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """A different answer for each seed."""
    data = f"seed {request.sampling.seed}".encode()
    yield started(request, cached=2)
    for byte in data:
        yield tokens([byte])
    yield finished(request, len(data), cached=2)


async def with_scores(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """A🙂B, two bytes an event, then the token that ends it; scored as asked."""
    ids = [*"A🙂B".encode(), 257]
    yield started(request)
    for start in range(0, len(ids), 2):
        yield scored(request, ids[start : start + 2])
    yield finished(request, len(ids))


@pytest.mark.parametrize("path", PATHS)
async def test_each_choice_has_its_own_seed(
    start_worker: StartWorker, open_gateway: OpenGateway, path: str
) -> None:
    worker = await start_worker(script=by_seed)
    gateway = await open_gateway(worker)
    reply = (await gateway.client.post(path, json=chat(prompt="x", n=3, seed=2**64 - 2))).json()
    choices = reply["choices"]
    texts = [item["message"]["content"] if "chat" in path else item["text"] for item in choices]
    assert [item["index"] for item in choices] == [0, 1, 2]
    assert texts == [f"seed {seed}" for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert len({request.request_id for request in worker.requests}) == 3
    assert reply["id"].split("-")[1] == worker.requests[0].request_id
    usage = reply["usage"]
    assert usage["completion_tokens"] == sum(map(len, texts))
    assert usage["prompt_tokens"] == len(worker.requests[0].prompt_token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    report = usage["forepage"]
    assert [each["mode_final"] for each in report.pop("per_choice")] == ["exact"] * 3
    assert report["mode_final"] == "exact"


@pytest.mark.parametrize("path", PATHS)
async def test_streamed_choices_interleave_and_end_one_by_one(
    start_worker: StartWorker, open_gateway: OpenGateway, path: str
) -> None:
    gateway = await open_gateway(await start_worker(script=by_seed))
    body = chat(prompt="x", n=8, seed=10, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(await gateway.client.post(path, json=body))
    assert done == "[DONE]"
    for index in range(8):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        texts = [(each["delta"].get("content", "") if "chat" in path else each["text"]) for each in mine]
        assert "".join(texts) == f"seed {10 + index}"
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert len(usage["usage"]["forepage"]["per_choice"]) == 8
    assert usage["usage"]["completion_tokens"] == 8 * len("seed 10")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_that_fails_fails_the_reply_and_frees_the_others(
    start_worker: StartWorker, open_gateway: OpenGateway, stream: bool
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        if request.sampling.seed == 6:
            yield started(request)
            yield pb.GenerateEvent(failed=pb.Failed(code="capacity_exhausted", message="no room"))
        async for event in endless(request):
            yield event

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    reply = await gateway.client.post(PATHS[0], json=chat(n=3, seed=5, stream=stream))
    error = events_of(reply)[-1] if stream else reply.json()
    assert error["error"]["code"] == "capacity_exhausted"
    assert reply.status_code == (200 if stream else 503)
    await until(lambda: worker.cancelled >= 2)
    assert gateway.admission.running == 0


async def test_a_choice_that_is_refused_before_the_answer_is_plain_http(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        if request.sampling.seed == 6:
            yield pb.GenerateEvent(failed=pb.Failed(code="rate_limit_exceeded", message="full"))
        async for event in endless(request):
            yield event

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    reply = await gateway.client.post(PATHS[0], json=chat(n=3, seed=5, stream=True))
    assert reply.status_code == 429
    await until(lambda: worker.cancelled >= len(worker.requests) - 1)


async def test_stop_strings_end_choices_apart(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker(script=by_seed))
    reply = (await gateway.client.post(PATHS[0], json=chat(n=2, seed=1, stop="d 1"))).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["see", "seed 2"]
    first, second = reply["usage"]["forepage"]["per_choice"]
    assert first is None
    assert second["mode_final"] == "exact"


async def test_chat_logprobs(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    worker = await start_worker(script=with_scores)
    gateway = await open_gateway(worker)
    body = chat(logprobs=True, top_logprobs=2)
    reply = (await gateway.client.post(PATHS[0], json=body)).json()
    assert worker.requests[0].sampling.logprobs
    assert worker.requests[0].sampling.num_logprobs == 2
    scores = reply["choices"][0]["logprobs"]
    assert scores["refusal"] is None
    top = [
        {"token": "A", "logprob": -1.0, "bytes": [65]},
        {"token": "B", "logprob": -2.0, "bytes": [66]},
    ]
    assert scores["content"][0] == {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": top}
    assert [entry["bytes"] for entry in scores["content"]] == [[byte] for byte in "A🙂B".encode()] + [[]]
    assert [entry["token"] for entry in scores["content"]][1:] == [
        *["\ufffd"] * 4,
        "B",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
    ]


async def test_streamed_chat_logprobs_come_once_and_in_order(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker(script=with_scores))
    *chunks, _ = events_of(await gateway.client.post(PATHS[0], json=chat(logprobs=True, stream=True)))
    scores = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    entries = [entry for score in scores if score for entry in score["content"]]
    assert [entry["bytes"] for entry in entries] == [[byte] for byte in "A🙂B".encode()] + [[]]
    assert all(entry["top_logprobs"] == [] for entry in entries)


@pytest.mark.parametrize("num_top", [0, 3])
async def test_completion_logprobs(
    start_worker: StartWorker, open_gateway: OpenGateway, num_top: int
) -> None:
    gateway = await open_gateway(await start_worker(script=with_scores))
    body = {"model": MODEL, "prompt": "x", "logprobs": num_top}
    scores = (await gateway.client.post(PATHS[1], json=body)).json()["choices"][0]["logprobs"]
    assert scores["tokens"][0] == "A"
    assert scores["token_logprobs"] == [-0.5] * 7
    assert scores["text_offset"] == [0, 1, 1, 1, 1, 2, 3]
    if num_top:
        assert scores["top_logprobs"][0] == {"A": -0.5, "B": -2.0, "C": -3.0}
    else:
        assert scores["top_logprobs"] is None


async def test_logprobs_stop_where_the_text_stops(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker(script=with_scores))
    reply = (await gateway.client.post(PATHS[0], json=chat(logprobs=True, stop="🙂"))).json()
    assert len(reply["choices"][0]["logprobs"]["content"]) == reply["usage"]["completion_tokens"] == 5


async def test_a_worker_without_logprobs_is_told_to_the_client(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post(PATHS[0], json=chat(logprobs=True))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
    reply = await gateway.client.post(PATHS[0], json=chat(logprobs=False))
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER


async def test_a_wrong_number_of_logprobs_is_the_servers_fault(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        event = scored(request, [65, 66])
        event.tokens.top.pop()
        yield event

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post(PATHS[0], json=chat(logprobs=True, top_logprobs=1))
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "integrity_error")


async def test_impossible_tokens_keep_json_valid(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        async for event in saying("A")(request):
            for token in event.tokens.token_ids:
                event.tokens.chosen.add(token_id=token, logprob=float("-inf"))
            yield event

    gateway = await open_gateway(await start_worker(script=script))
    reply: Any = (await gateway.client.post(PATHS[0], json=chat(logprobs=True))).json()
    assert reply["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
