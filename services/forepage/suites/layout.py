"""How many characters a document may have, so that the whole chat with its answer just fits.

The chat layout spends one token on each control: BOS, the user's and the assistant's mark, the end of
thinking and of the answer; everything else is one token a byte.
"""

from collections.abc import Iterable, Sequence

from forepage.suites.task import Evidence, Question, Task, Turn

USER_CONTROLS = 1
ASSISTANT_CONTROLS = 3
SEPARATOR = "\n\n"

EXAMPLE_FROM = 4096
EXAMPLE_TOKENS = 1024
"""From the first length on, a document may begin with a solved example of the second."""


def chat_tokens(turns: Iterable[Turn], answer: str) -> int:
    """Tokens of a whole chat, from BOS to the end of its answer."""
    total = 1 + ASSISTANT_CONTROLS + len(answer)
    for turn in turns:
        total += (
            len(turn.text) + {"system": 0, "user": USER_CONTROLS, "assistant": ASSISTANT_CONTROLS}[turn.role]
        )
    return total


def document_room(length_tokens: int, questions: Sequence[Question]) -> int:
    """Characters left for an inline document beside the longest question with its answer."""
    longest = max(len(question.text) + len(question.answer) for question in questions)
    return length_tokens - longest - len(SEPARATOR) - 1 - USER_CONTROLS - ASSISTANT_CONTROLS


def inline_task(suite: str, document: str, questions: Sequence[Question]) -> Task:
    """A task that is one document; the questions' evidence is already in place."""
    return Task(suite, (Turn("user", document),), True, tuple(questions))


def example(task: Task) -> str:
    """A short task with its answer, to stand before a document as RULER has it for two of its tasks."""
    question = task.questions[0]
    return f"{task.context[0].text}\n{question.text}\nAnswer: {question.answer}\n\n"


def span(start: int, text: str, turn: int = 0) -> Evidence:
    """The evidence that is a whole text."""
    return Evidence(turn, start, start + len(text))


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]
