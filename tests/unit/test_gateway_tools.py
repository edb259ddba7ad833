"""Chats that think and call tools: what the model is shown, and how its answer is told apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from forepage.rpc import worker_pb2 as pb
from forepage.settings import SEEDED_MODEL
from forepage.text.control_tokens import ControlToken
from forepage.text.tokenizer import TOKENIZER_FILE
from forepage.text.wording import Wording
from rigs.fake_worker import StartWorker, answer_ids, saying
from rigs.gateways import OpenGateway, chat, events_of, until
from rigs.v4_tokenizer import v4_folder, v4_oracle

# ruff: noqa: RUF001
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"strict": True, "name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALLS = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Pa"ris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="clock">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)
ARGUMENTS = '{"city": "Pa\\"ris", "days": 3}'
PATH = "/v1/chat/completions"


def shown(request: pb.GenerateRequest) -> str:
    """The prompt, control tokens spelled."""
    names = {item["id"]: item["content"] for item in json.loads(TOKENIZER_TEXT)["added_tokens"]}
    ids = request.prompt_token_ids
    return b"".join(names[i].encode() if i in names else bytes([i]) for i in ids).decode()


TOKENIZER_TEXT = (SEEDED_MODEL / TOKENIZER_FILE).read_text(encoding="utf-8")


async def test_answer_is_reasoning_content_and_calls(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker(script=saying(f"Well.</think>Let me see.{CALLS}")))
    reply = await gateway.client.post(PATH, json=chat(tools=[TOOL], reasoning_effort="high"))
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Well.")
    first, second = message["tool_calls"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS},
    }
    assert second["function"] == {"name": "clock", "arguments": "{}"}
    assert first["id"] != second["id"]


async def test_calls_alone_have_null_content(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker(script=saying(CALLS)))
    reply = (await gateway.client.post(PATH, json=chat(tools=[TOOL]))).json()
    assert reply["choices"][0]["message"]["content"] is None
    assert "reasoning_content" not in reply["choices"][0]["message"]


@pytest.mark.parametrize("width", [1, 2, 7, 1000])
async def test_stream_deltas_add_up(start_worker: StartWorker, open_gateway: OpenGateway, width: int) -> None:
    script = saying(f"Well.</think>Let me see.{CALLS}", width=width)
    gateway = await open_gateway(await start_worker(script=script))
    body = chat(tools=[TOOL], stream=True, chat_template_kwargs={"thinking": True})
    *chunks, done = events_of(await gateway.client.post(PATH, json=body))
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    deltas = [choice["delta"] for choice in choices]
    assert all(len(delta) == 1 for delta in deltas[1:-1])
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Well."
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    heads = [piece for piece in pieces if "id" in piece]
    assert [(head["index"], head["type"], head["function"]) for head in heads] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "clock", "arguments": ""}),
    ]
    assert pieces.index(heads[1]) > max(index for index, piece in enumerate(pieces) if piece["index"] == 0)
    for index, expected in enumerate([ARGUMENTS, "{}"]):
        found = [piece["function"]["arguments"] for piece in pieces if piece["index"] == index]
        assert "".join(found) == expected


async def test_prompt_shows_tools_calls_and_results(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "latest_reminder", "content": "today"},
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": function},
                {"id": "2", "function": {**function, "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": "B"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "A</think>"}]},
    ]
    body = chat(messages=messages, tools=[TOOL], tool_choice="auto", reasoning_effort="low")
    assert (await gateway.client.post(PATH, json=body)).status_code == 200
    block = Wording.load(SEEDED_MODEL).tools.replace("{tool_schemas}", json.dumps(TOOL["function"]))
    assert shown(worker.requests[0]) == (
        f"{ControlToken.BOS}S\n\n{block}<｜latest_reminder｜>today<｜User｜>Q<｜Assistant｜><think>hm</think>\n\n"
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="weather">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>'
        "<｜User｜><tool_result>A</think></tool_result>\n\n<tool_result>B</tool_result><｜Assistant｜><think>"
    )


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "</think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"reasoning_effort": "minimal"}, "</think>"),
        ({"reasoning_effort": "minimal", "chat_template_kwargs": {"thinking": False}}, "</think>"),
        ({"reasoning_effort": "medium"}, "<think>"),
        ({"chat_template_kwargs": {"thinking": False}}, "</think>"),
        ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "high"}, "<think>"),
        ({"chat_template_kwargs": {}}, "</think>"),
    ],
    ids=str,
)
async def test_thinking_is_switched(
    start_worker: StartWorker, open_gateway: OpenGateway, fields: dict[str, Any], end: str
) -> None:
    worker = await start_worker(script=saying("a</think>b"))
    gateway = await open_gateway(worker)
    message = (await gateway.client.post(PATH, json=chat("Q", **fields))).json()["choices"][0]["message"]
    assert shown(worker.requests[0]) == f"{ControlToken.BOS}<｜User｜>Q<｜Assistant｜>{end}"
    if end == "<think>":
        assert (message["reasoning_content"], message["content"]) == ("a", "b")
    else:
        assert message == {"role": "assistant", "content": "a</think>b"}


async def test_earlier_reasoning_stays_when_asked(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    user = {"role": "user", "content": "Q"}
    messages = [user, {"role": "assistant", "content": "A", "reasoning_content": "R"}, user]
    for dropped in (True, False):
        switches = {"thinking": True, "drop_thinking": dropped}
        await gateway.client.post(PATH, json=chat(messages=messages, chat_template_kwargs=switches))
    first, second = map(shown, worker.requests)
    assert "<｜Assistant｜></think>A" in first
    assert "<｜Assistant｜><think>R</think>A" in second


async def test_tool_choice_none_shows_no_tools_and_reads_no_calls(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(script=saying(CALLS))
    gateway = await open_gateway(worker)
    reply = (await gateway.client.post(PATH, json=chat("Q", tools=[TOOL], tool_choice="none"))).json()
    assert shown(worker.requests[0]) == f"{ControlToken.BOS}<｜User｜>Q<｜Assistant｜></think>"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": CALLS}
    assert reply["choices"][0]["finish_reason"] == "stop"


async def test_without_parallel_calls_the_first_ends_the_answer(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> Any:
        async for event in saying(CALLS, width=5)(request):
            if event.WhichOneof("event") != "finished":
                yield event
        while True:
            yield pb.GenerateEvent(tokens=pb.Tokens(token_ids=[120]))

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    reply = (await gateway.client.post(PATH, json=chat(tools=[TOOL], parallel_tool_calls=False))).json()
    (choice,) = reply["choices"]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [ARGUMENTS]
    assert choice["finish_reason"] == "tool_calls"
    assert reply["usage"]["completion_tokens"] < len(answer_ids(CALLS))
    await until(lambda: worker.cancelled == 1)


WORDED = '{"type": "object", "properties": {}}'


@pytest.mark.parametrize(
    ("fields", "names", "max_calls"),
    [
        ({"tool_choice": "required"}, ["weather", "clock"], 0),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["weather", "clock"], 1),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"], 1),
        ({"tool_choice": "auto"}, [], 0),
        ({"tool_choice": "none", "response_format": {"type": "json_object"}}, [], 0),
        ({"response_format": {"type": "json_object"}}, ["weather", "clock"], 0),
        ({"response_format": {"type": "text"}}, [], 0),
    ],
    ids=str,
)
async def test_worker_is_told_which_calls_must_come(
    start_worker: StartWorker,
    open_gateway: OpenGateway,
    fields: dict[str, Any],
    names: list[str],
    max_calls: int,
) -> None:
    worker = await start_worker(script=saying(CALLS))
    gateway = await open_gateway(worker)
    clock = {"type": "function", "function": {"name": "clock"}}
    body = chat("Q", tools=[TOOL, clock], reasoning_effort="high", **fields)
    (choice,) = (await gateway.client.post(PATH, json=body)).json()["choices"]
    asked = worker.requests[0].sampling
    schemas = {"weather": WORDED, "clock": ""}
    assert [(tool.name, tool.parameters) for tool in asked.forced_tools] == [
        (name, schemas[name]) for name in names
    ]
    assert asked.max_calls == max_calls
    assert asked.HasField("json_schema") == (fields.get("response_format") == {"type": "json_object"})
    assert asked.HasField("free_until_token_id") == bool(names or asked.HasField("json_schema"))
    tools_shown = Wording.load(SEEDED_MODEL).tools.split("\n")[0] in shown(worker.requests[0])
    assert tools_shown == (fields.get("tool_choice") != "none")
    assert (choice["finish_reason"] == "tool_calls") == tools_shown


async def test_forced_calls_bind_where_json_is_asked_too(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(script=saying(CALLS))
    gateway = await open_gateway(worker)
    body = chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"})
    await gateway.client.post(PATH, json=body)
    assert not worker.requests[0].sampling.HasField("json_schema")
    assert [tool.name for tool in worker.requests[0].sampling.forced_tools] == ["weather"]


async def test_an_answer_that_the_worker_ends_keeps_its_report(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    """One forced call: the worker counts, so the gateway has nothing to cut."""
    one = CALLS[: CALLS.index('<｜DSML｜invoke name="clock">')] + "</｜DSML｜tool_calls>"
    gateway = await open_gateway(await start_worker(script=saying(one)))
    named = {"type": "function", "function": {"name": "weather"}}
    reply = (await gateway.client.post(PATH, json=chat(tools=[TOOL], tool_choice=named))).json()
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert reply["usage"]["forepage"]["mode_final"] == "exact"


async def test_an_answer_to_a_task_is_constrained_from_its_start(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    """It holds no reasoning, so nothing of it is free."""
    (tmp_path / TOKENIZER_FILE).symlink_to(v4_folder() / TOKENIZER_FILE)
    worker = await start_worker()
    gateway = await open_gateway(worker, folder=tmp_path)
    asked = [{"role": "user", "content": "Q", "task": "query"}]
    body = chat(messages=asked, reasoning_effort="high", response_format={"type": "json_object"})
    assert (await gateway.client.post(PATH, json=body)).status_code == 200
    assert worker.requests[0].sampling.HasField("json_schema")
    assert not worker.requests[0].sampling.HasField("free_until_token_id")


async def test_calls_cut_by_a_stop_token_are_no_valid_json(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    cut = CALLS[: CALLS.index("ris")] + "Z"
    worker = await start_worker(script=saying(cut))
    gateway = await open_gateway(worker)
    reply = await gateway.client.post(PATH, json=chat(tools=[TOOL], stop_token_ids=[ord("Z")]))
    (choice,) = reply.json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Pa\\"'
    assert choice["finish_reason"] == "stop"
    assert list(worker.requests[0].sampling.stop_token_ids) == [ord("Z"), 257]


async def test_calls_cut_by_length_are_no_valid_json(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    cut = CALLS[: CALLS.index("ris")]
    gateway = await open_gateway(await start_worker(script=saying(cut, reason="LENGTH")))
    (choice,) = (await gateway.client.post(PATH, json=chat(tools=[TOOL]))).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Pa\\"'


async def test_v4_tokenizer_serves_tasks_and_max_effort(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    worker = await start_worker()
    (tmp_path / TOKENIZER_FILE).symlink_to(v4_folder() / TOKENIZER_FILE)
    (tmp_path / "reasoning_effort_max.txt").write_text("Try hard.\n")
    gateway = await open_gateway(worker, folder=tmp_path)
    asked = [{"role": "user", "content": "Q", "task": "read_url", "extracted_url": "http://x/"}]
    switches = {"thinking": True}
    reply = await gateway.client.post(PATH, json=chat(messages=asked, chat_template_kwargs=switches))
    assert "reasoning_content" not in reply.json()["choices"][0]["message"]
    await gateway.client.post(PATH, json=chat("Q", reasoning_effort="max"))
    found = [
        v4_oracle().decode(list(item.prompt_token_ids), skip_special_tokens=False) for item in worker.requests
    ]
    assert found == [
        f"{ControlToken.BOS}<｜User｜>Q<｜extracted_url｜>http://x/<｜read_url｜>",
        f"{ControlToken.BOS}Try hard.\n<｜User｜>Q<｜Assistant｜><think>",
    ]
