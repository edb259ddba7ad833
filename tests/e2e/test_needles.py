"""The bundled model finds what is asked for in 16K tokens, paged or not; the newest part alone does not."""

from collections.abc import Iterator

import pytest

from forepage.settings import TINY_MODEL
from forepage.suites.grading import grade
from forepage.suites.registry import generate
from forepage.suites.task import Question, Split, Task, messages, outside_last
from rigs.chat import Answer, stream_chat
from rigs.stack import Stack, running_stack

SUITE, TOKENS, SEED = "ruler_niah_multikey_1", 16_384, 1_000_000
BUDGET_BLOCKS = 16
"""Of 64, besides the newest 2,048 tokens."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Processes that serve forepage-tiny."""
    settings = {"FOREPAGE_MODEL__PATH": str(TINY_MODEL), "FOREPAGE_WORKER__KV_BYTES": str(256 << 20)}
    with running_stack(tmp_path_factory.mktemp("needles"), settings=settings) as stack:
        yield stack
    assert stack.leftovers() == []


@pytest.fixture(scope="module")
def task() -> Task:
    """Records with names like one another, in a text of the test split."""
    return generate(SUITE, length_tokens=TOKENS, split=Split.TEST, seed=SEED, num_questions=4)


@pytest.fixture(scope="module")
def far(task: Task) -> list[Question]:
    """Questions whose answer lies before what every plan keeps."""
    found = [question for question in task.questions if outside_last(task, question, tokens=6_000)]
    assert len(found) == 3
    return found


def ask(stack: Stack, task: Task, question: Question, mode: str, **residency: object) -> Answer:
    """The reply to a question about the document."""
    turns = [{"role": turn.role, "content": turn.text} for turn in messages(task, question)]
    forepage = {"mode": mode, **residency}
    return stream_chat(
        stack.url, turns, mode=mode, model="forepage-tiny", max_tokens=60, ignore_eos=False, forepage=forepage
    )


def scores(
    stack: Stack, task: Task, questions: list[Question], mode: str, **residency: object
) -> list[float]:
    """How right each reply is."""
    return [grade(question, ask(stack, task, question, mode, **residency).text) for question in questions]


def test_full_finds_every_needle(stack: Stack, task: Task, far: list[Question]) -> None:
    assert scores(stack, task, far, "full") == [1.0, 1.0, 1.0]


def test_guarded_finds_every_needle_with_a_quarter_of_the_blocks(
    stack: Stack, task: Task, far: list[Question]
) -> None:
    answers = [ask(stack, task, question, "guarded", budget_blocks=BUDGET_BLOCKS) for question in far]
    assert [grade(question, answer.text) for question, answer in zip(far, answers, strict=True)] == [1.0] * 3
    assert all(answer.forepage["paged_steps"] > 0 for answer in answers)
    assert all(answer.forepage["c4_footprint"] < 0.8 for answer in answers)


def test_the_newest_blocks_alone_do_not_do(stack: Stack, task: Task, far: list[Question]) -> None:
    newest = scores(stack, task, far, "lookahead", plan_source="recency", budget_blocks=BUDGET_BLOCKS)
    assert newest == [0.0, 0.0, 0.0]
