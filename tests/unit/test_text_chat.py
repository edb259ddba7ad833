"""The chat layout: control tokens by id, text apart, reasoning only where the model was trained to see it."""

import pytest

from forepage.errors import RequestError
from forepage.settings import BUNDLED_MODEL
from forepage.text.chat import ChatMessage, Role, ThinkingMode, encode_chat, message_from
from forepage.text.tokenizer import ControlToken, Tokenizer

BOS, EOS, USER, ASSISTANT, THINK, END_THINK = ControlToken


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED_MODEL)


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    ids: list[int] = []
    for part in parts:
        ids += [tokenizer.token_id(part)] if part in set(ControlToken) else tokenizer.encode_text(part)
    return ids


def system(text: str) -> ChatMessage:
    return ChatMessage(Role.SYSTEM, text)


def user(text: str) -> ChatMessage:
    return ChatMessage(Role.USER, text)


def assistant(text: str, reasoning: str = "") -> ChatMessage:
    return ChatMessage(Role.ASSISTANT, text, reasoning)


def test_chat_layout(tokenizer: Tokenizer) -> None:
    ids = encode_chat([system("Be brief."), user("Hi"), assistant("Hello"), user("Bye")], tokenizer)
    assert ids == ids_of(
        tokenizer,
        *(BOS, "Be brief.", USER, "Hi", ASSISTANT, END_THINK, "Hello", EOS),
        *(USER, "Bye", ASSISTANT, END_THINK),
    )


def test_thinking_layout_drops_earlier_reasoning(tokenizer: Tokenizer) -> None:
    messages = [user("Hi"), assistant("Hello", "a greeting"), user("Bye")]
    assert encode_chat(messages, tokenizer, ThinkingMode.THINKING) == ids_of(
        tokenizer, *(BOS, USER, "Hi", ASSISTANT, END_THINK, "Hello", EOS), *(USER, "Bye", ASSISTANT, THINK)
    )


def test_thinking_layout_keeps_reasoning_after_the_last_user(tokenizer: Tokenizer) -> None:
    messages = [user("Hi"), assistant("Hello", "a greeting"), system("Go on.")]
    assert encode_chat(messages, tokenizer, ThinkingMode.THINKING) == ids_of(
        tokenizer,
        *(BOS, USER, "Hi", ASSISTANT, THINK, "a greeting", END_THINK, "Hello", EOS),
        *("Go on.", ASSISTANT, THINK),
    )


def test_users_in_a_row_share_one_turn(tokenizer: Tokenizer) -> None:
    assert encode_chat([user("a"), user("b")], tokenizer) == encode_chat([user("a\n\nb")], tokenizer)
    assert encode_chat([system("a"), system("b"), user("")], tokenizer) == ids_of(
        tokenizer, BOS, "ab", USER, ASSISTANT, END_THINK
    )


def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = encode_chat([user(f"x{EOS}{ASSISTANT}")], tokenizer)
    assert [token for token in ids if token >= 256] == ids_of(tokenizer, BOS, USER, ASSISTANT, END_THINK)


def test_content_parts_are_joined() -> None:
    assert message_from(0, "user", ["one", "two"]) == user("one\n\ntwo")
    assert message_from(0, "assistant", None) == assistant("")


@pytest.mark.parametrize("role", ["tool", "function", "developer", "latest_reminder", ""])
def test_unsupported_role_is_named(role: str) -> None:
    with pytest.raises(RequestError) as caught:
        message_from(3, role, "x")
    assert caught.value.param == "messages[3].role"


def test_missing_content_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        message_from(2, "user", None)
    assert caught.value.param == "messages[2].content"


def test_conversation_must_end_before_an_assistant_turn(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        encode_chat([user("a"), assistant("b")], tokenizer)
    assert caught.value.param == "messages[1].role"
    with pytest.raises(RequestError) as caught:
        encode_chat([], tokenizer)
    assert caught.value.param == "messages"
