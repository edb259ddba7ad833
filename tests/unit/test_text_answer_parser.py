"""Answers told apart: reasoning, content, calls; what is malformed or cut off stays visible."""

import json
from typing import Any

import pytest

from forepage.text.answer_parser import AnswerParser, ArgumentsDelta, CallDelta, ContentDelta
from forepage.text.messages import ThinkingMode
from rigs.answers import Gathered, parsed

# ruff: noqa: RUF001
OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
INVOKE, END = '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>"


def parameter(name: str, value: str, is_text: bool = True) -> str:
    flag = "true" if is_text else "false"
    return f'<｜DSML｜parameter name="{name}" string="{flag}">{value}</｜DSML｜parameter>'


def call(*parameters: str, name: str = "f") -> str:
    return "\n".join([f'<｜DSML｜invoke name="{name}">', *parameters, END])


def block(*calls: str) -> str:
    return "\n".join([OPEN, *calls, CLOSE])


CITY = call(parameter("city", "Paris"))
WELL_FORMED: dict[str, tuple[str, Gathered]] = {
    "content": ("Hello.\n\n", Gathered(content="Hello.\n\n")),
    "one call": ("\n\n" + block(CITY), Gathered(calls=[("f", '{"city": "Paris"}')])),
    "content and calls": (
        f"Let me see.\n\n{block(CITY, call(name='g'))}",
        Gathered(content="Let me see.", calls=[("f", '{"city": "Paris"}'), ("g", "{}")]),
    ),
    "only the newlines of the markup go": (
        f"a\n\n\n\n{block(CITY)}\nb",
        Gathered(content="a\n\n\nb", calls=[("f", '{"city": "Paris"}')]),
    ),
    "kinds of values": (
        block(
            call(
                parameter("text", 'say "hi"\n\\ <b> "', True),
                parameter("number", " 3.5e2 ", False),
                parameter("list", '[1, {"a": null}]', False),
                parameter('quo"ted" name', "", True),
                parameter("looks", "12", True),
            )
        ),
        Gathered(
            calls=[
                (
                    "f",
                    '{"text": "say \\"hi\\"\\n\\\\ <b> \\"", "number":  3.5e2 , "list": [1, {"a": null}], '
                    '"quo\\"ted\\" name": "", "looks": "12"}',
                )
            ]
        ),
    ),
    "two blocks": (
        f"{block(CITY)}x{block(CITY)}",
        Gathered(content="x", calls=[("f", '{"city": "Paris"}'), ("f", '{"city": "Paris"}')]),
    ),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_answers(name: str) -> None:
    text, expected = WELL_FORMED[name]
    assert parsed([text]) == expected
    assert parsed(text) == expected  # letter by letter
    assert parsed([text]).arguments is not None


MALFORMED: dict[str, tuple[str, Gathered]] = {
    "block without calls": (f"a\n\n{OPEN}\n{CLOSE}", Gathered(content=f"a\n\n{OPEN}\n{CLOSE}")),
    "block of prose": (f"The tag {OPEN} opens.", Gathered(content=f"The tag {OPEN} opens.")),
    "call without a name": (f"{OPEN}<｜DSML｜invoke>", Gathered(content=f"{OPEN}<｜DSML｜invoke>")),
    "call outside a block": (CITY, Gathered(content=CITY)),
    "cut before a call": (f"a\n\n{OPEN}\n<｜DSML｜inv", Gathered(content=f"a\n\n{OPEN}\n<｜DSML｜inv")),
    "tag that never ends": (
        f'{OPEN}<｜DSML｜invoke name="{"f" * 2000}">',
        Gathered(content=f'{OPEN}<｜DSML｜invoke name="{"f" * 2000}">'),
    ),
    "stray text in a call": (
        block(call("so: <b>", parameter("k", "v"), "and < more ")),
        Gathered(content="\nso: <b>\n\nand < more \n", calls=[("f", '{"k": "v"}')]),
    ),
    "endless spaces": (
        f"{OPEN}{INVOKE}{' ' * 2000}{parameter('k', 'v')}{END}{' ' * 2000}{CITY}",
        Gathered(content=" " * 4000 + CITY, calls=[("f", '{"k": "v"}')]),
    ),
    "endless spaces before a call": (
        f"{OPEN}{' ' * 2000}{CITY}",
        Gathered(content=f"{OPEN}{' ' * 2000}{CITY}"),
    ),
    "not JSON after all": (
        block(call(parameter("a", "True", False), parameter("b", "NaN", False), parameter("c", "", False))),
        Gathered(calls=[("f", '{"a": "True", "b": "NaN", "c": ""}')]),
    ),
    "no string attribute": (
        block(call('<｜DSML｜parameter name="k">v</｜DSML｜parameter>')),
        Gathered(calls=[("f", '{"k": "v"}')]),
    ),
    "arguments as one object": (
        block(call('{"a": {"b": "</x>"}}')),
        Gathered(calls=[("f", '{"a": {"b": "</x>"}}\n')]),
    ),
    "closing tags left out": (
        f'{OPEN}{INVOKE}{parameter("k", "v")}\n{INVOKE}<｜DSML｜parameter name="k" string="true">w{CLOSE}!',
        Gathered(content="!", calls=[("f", '{"k": "v"}'), ("f", '{"k": "w"}')]),
    ),
    "ended without any closing tag": (
        f'{OPEN}{INVOKE}<｜DSML｜parameter name="k" string="false">[1',
        Gathered(calls=[("f", '{"k": "[1"}')]),
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_lose_nothing(name: str) -> None:
    text, expected = MALFORMED[name]
    assert parsed([text]) == expected
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (f"{OPEN}{INVOKE}", [("f", "")], ""),
        (f'{OPEN}{INVOKE}<｜DSML｜parameter name="k" string="true">some te', [("f", '{"k": "some te')], ""),
        (f'{OPEN}{INVOKE}<｜DSML｜parameter name="k" string="false">[1, 2', [("f", '{"k": [1, 2')], ""),
        (f"{OPEN}{INVOKE}{parameter('k', 'v')}\n", [("f", '{"k": "v"')], ""),
        (f"{OPEN}{INVOKE}{parameter('k', 'v')}<｜DSML｜par", [("f", '{"k": "v"')], "<｜DSML｜par"),
        (f"{OPEN}{INVOKE}{parameter('k', 'v')}{END}", [("f", '{"k": "v"}')], ""),
    ],
)
def test_a_call_that_was_cut_off_stays_open(text: str, calls: list[Any], content: str) -> None:
    assert parsed(text, complete=False) == Gathered(content=content, calls=calls)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hm</think>Yes.", Gathered("hm", "Yes.")),
        ("</think>Yes.", Gathered("", "Yes.")),
        ("still thinking </thi", Gathered("still thinking </thi")),
        ("a</think>b</think>c", Gathered("a", "b</think>c")),
        (f"hm\n</think>\n\n{block(CITY)}", Gathered("hm\n", "", [("f", '{"city": "Paris"}')])),
        (f"hm\n\n{block(CITY)} done", Gathered("hm", " done", [("f", '{"city": "Paris"}')])),
        (f"I could write {OPEN}, no.</think>Yes.", Gathered(f"I could write {OPEN}, no.", "Yes.")),
    ],
)
def test_reasoning_ends_at_its_tag_or_at_a_call(text: str, expected: Gathered) -> None:
    assert parsed([text], thinking=True) == expected
    assert parsed(text, thinking=True) == expected


def test_without_tools_or_thinking_markup_is_text() -> None:
    text = f"a</think>\n\n{block(CITY)}"
    assert parsed(text, with_tools=False) == Gathered(content=text)
    assert parsed(text, with_tools=False, thinking=True) == Gathered("a", text.removeprefix("a</think>"))


def test_name_comes_first_and_texts_as_they_arrive() -> None:
    parser = AnswerParser(ThinkingMode.CHAT, with_tools=True)
    assert parser.feed(f"Hi\n\n{OPEN}") == [ContentDelta("Hi")]
    assert parser.feed(f'\n{INVOKE}\n<｜DSML｜parameter name="k"') == [CallDelta(0, "f")]
    assert parser.feed(' string="true">one "two') == [
        ArgumentsDelta(0, '{"k": "'),
        ArgumentsDelta(0, 'one \\"two'),
    ]
    assert parser.feed(" three</｜DSML｜par") == [ArgumentsDelta(0, " three")]
    assert parser.feed("ameter>\n") == [ArgumentsDelta(0, '"')]
    assert parser.feed(END) == [ArgumentsDelta(0, "}")]
    assert parser.feed(CLOSE) == []
    assert parser.finish(complete=True) == []


def test_answer_ends_behind_the_last_call_that_is_wanted() -> None:
    text = f"a\n\n{block(CITY, CITY)}b"
    expected = Gathered(content="a", calls=[("f", '{"city": "Paris"}')])
    assert parsed(text, max_calls=1) == expected
    assert parsed([text], max_calls=1) == expected


def test_deep_and_huge_values_are_no_trouble() -> None:
    deep, long = "[" * 100_000, "9" * 100_000
    found = parsed([block(call(parameter("deep", deep, False), parameter("long", long, False)))])
    assert json.loads(found.calls[0][1]) == {"deep": deep, "long": long}
