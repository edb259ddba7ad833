"""What counts as right, kind by kind."""

import pytest

from forepage.suites.grading import chosen, grade
from forepage.suites.task import (
    Evidence,
    Question,
    Task,
    Turn,
    evidence_depth,
    messages,
    outside_last,
    tokens_after,
)


def question(kind: str, *expected: str) -> Question:
    return Question("?", "", expected, (), kind)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("They are 1234567 and 7654321.", 1.0),
        ("It is 1234567.", 0.5),
        ("1234567", 0.5),
        ("I do not know.", 0.0),
        ("", 0.0),
        ("71234567 and 76543210", 1.0),  # RULER asks for a substring
    ],
)
def test_needles_score_the_share_that_occurs(reply: str, score: float) -> None:
    assert grade(question("niah_multivalue", "1234567", "7654321"), reply) == score


def test_words_are_compared_without_case() -> None:
    assert grade(question("niah_single_1", "Brave-Otter"), "it is BRAVE-OTTER!") == 1.0


@pytest.mark.parametrize(("reply", "score"), [("I said 86 degrees.", 1.0), ("in 1862", 0.0), ("186", 0.0)])
def test_short_numbers_must_stand_alone(reply: str, score: float) -> None:
    assert grade(question("single_session_assistant", "86"), reply) == score


def test_reading_needs_any_of_the_answers_wherever_the_walk_has_it() -> None:
    asked = question("qa_2", "Castonia", "Kingdom of Castonia")
    assert grade(asked, "He was born in Velmora. Velmora lies in Castonia.") == 1.0
    assert grade(asked, "He was born in Velmora.") == 0.0


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("The mayor is Ann. The correct answer is (B).", "B"),
        ("The correct answer is B", "B"),
        ("answer: (c)", "C"),
        ("B", "B"),
        (" (d). ", "D"),
        ("The answer is (A). No, the correct answer is (B).", "B"),
        ("A river runs there", None),
        ("The correct answer is (E).", None),
        ("The answer is Boston", None),
        ("", None),
    ],
)
def test_choice_is_the_last_letter_that_is_named_as_the_answer(reply: str, letter: str | None) -> None:
    assert chosen(reply) == letter
    assert grade(question("choice_one_hop", "B"), reply) == float(letter == "B")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("You visited Ada, Bo and Cy. That makes 3.", 1.0),
        ("three", 1.0),
        ("On 2023/05/02 and 2023/05/05, so the days between are 3.", 1.0),
        ("You saw 3 of 4", 0.0),
        ("many", 0.0),
    ],
)
def test_counts_are_the_last_number(reply: str, score: float) -> None:
    assert grade(question("multi_session_count", "3"), reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("The lamp was on 2023/01/02 and the boat was on 2023/02/02, so the lamp came first.", 1.0),
        ("The boat came first, the lamp later.", 0.0),
        ("The lamp came before the boat.", 1.0),
        ("The boat was before the lamp.", 0.0),
        ("First the lamp, then the boat.", 1.0),
        ("the lamp", 1.0),
        ("the boat", 0.0),
        ("the lamp and the boat", 0.0),
        ("", 0.0),
    ],
)
def test_first_is_the_one_that_is_said_to_be(reply: str, score: float) -> None:
    assert grade(question("temporal_first", "lamp", "boat"), reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("You did not mention that.", 1.0),
        ("You didn't tell me.", 1.0),
        ("You have never mentioned it", 1.0),
        ("There is no mention of it.", 1.0),
        ("I do not know.", 1.0),
        ("Not enough information.", 1.0),
        ("You bought it at Toby's.", 0.0),
        ("", 0.0),
    ],
)
def test_abstention_says_that_it_was_not_mentioned(reply: str, score: float) -> None:
    assert grade(question("abstention", "You did not mention that."), reply) == score


def test_repeats_need_the_code_first_and_score_the_likeness() -> None:
    asked = question("mrcr_4", "Xy12", "Old clocks! They tick.")
    assert grade(asked, "Xy12Old clocks! They tick.") == 1.0
    assert grade(asked, "Old clocks! They tick.") == 0.0
    assert grade(asked, " Xy12Old clocks! They tick.") == 0.0
    assert 0.7 < grade(asked, "Xy12Old clocks! They tock.") < 1.0
    assert grade(asked, "Xy12") == 0.0


def test_repeats_without_a_code_score_the_whole() -> None:
    assert grade(question("mrcr_2", "", "Old clocks!"), "Old clocks!") == 1.0
    assert grade(question("mrcr_2", "", "Old clocks!"), "zzz") == 0.0


DOCUMENT = Task("ruler_qa_1", (Turn("user", "0123456789"),), True, ())
SESSIONS = Task("mrcr", (Turn("user", "01234"), Turn("assistant", "56789")), False, ())


def spanned(*spans: Evidence) -> Question:
    return Question("Which?", "", ("2",), spans, "qa_1")


def test_inline_question_follows_the_document_in_its_turn() -> None:
    assert messages(DOCUMENT, spanned()) == [Turn("user", "0123456789\n\nWhich?")]


def test_session_question_is_a_turn_of_its_own() -> None:
    assert messages(SESSIONS, spanned()) == [*SESSIONS.context, Turn("user", "Which?")]


def test_evidence_is_measured_from_the_end_of_the_context() -> None:
    span = Evidence(0, 2, 3)
    assert tokens_after(SESSIONS, span) == 7
    assert evidence_depth(SESSIONS, spanned(span)) == pytest.approx(0.3)
    assert evidence_depth(SESSIONS, spanned()) is None


@pytest.mark.parametrize(("tokens", "outside"), [(7, True), (8, False)])
def test_evidence_is_outside_the_last_tokens_only_if_all_of_it_is(tokens: int, outside: bool) -> None:
    assert outside_last(SESSIONS, spanned(Evidence(0, 2, 3)), tokens) is outside
    assert outside_last(SESSIONS, spanned(Evidence(0, 2, 3), Evidence(1, 0, 5)), tokens) is False
    assert outside_last(SESSIONS, spanned(), tokens) is False
