"""Which suites there are, and one verb that makes a task of any of them."""

from collections.abc import Callable

from forepage.suites.draw import Draw
from forepage.suites.frequency import common_words, frequent_words
from forepage.suites.layout import chat_tokens
from forepage.suites.longbench import longbench
from forepage.suites.longmemeval import longmemeval
from forepage.suites.mrcr import mrcr
from forepage.suites.niah import RECIPES, niah
from forepage.suites.reading import reading
from forepage.suites.task import Split, Task, messages
from forepage.suites.variables import variable_tracking

MIN_TOKENS = 512
MIN_FILL = 0.98

MAX_ATTEMPTS = 32
"""A draw whose parts turn out too long for the length is drawn again; nearly all fit at once."""

Generator = Callable[[Draw, int, int], Task]


def _needles(name: str) -> Generator:
    return lambda draw, length_tokens, num_questions: niah(draw, name, length_tokens, num_questions)


def _documents(name: str) -> Generator:
    return lambda draw, length_tokens, num_questions: reading(draw, name, length_tokens, num_questions)


GENERATORS: dict[str, Generator] = {f"ruler_{name}": _needles(name) for name in RECIPES} | {
    "ruler_vt": variable_tracking,
    "ruler_cwe": common_words,
    "ruler_fwe": frequent_words,
    "ruler_qa_1": _documents("qa_1"),
    "ruler_qa_2": _documents("qa_2"),
    "longmemeval": longmemeval,
    "longbench": longbench,
    "mrcr": mrcr,
}

SUITES: tuple[str, ...] = (
    "ruler_niah_single_1",
    "ruler_niah_single_2",
    "ruler_niah_single_3",
    "ruler_niah_multikey_1",
    "ruler_niah_multikey_2",
    "ruler_niah_multikey_3",
    "ruler_niah_multivalue",
    "ruler_niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_1",
    "ruler_qa_2",
    "longmemeval",
    "longbench",
    "mrcr",
)


def generate(suite: str, *, length_tokens: int, split: Split, seed: int, num_questions: int = 1) -> Task:
    """A task of a suite; the chat with its longest question and answer fills `length_tokens` to within 2 %.

    The same arguments give the same task on any machine. At most `num_questions` questions, at least one; a
    short text has room for few. Speed, one core of a 2-core x86 VM, Python 3.11: 1.1 to 3 MB/s of text at 512
    tokens, 2.2 to 6 at 4K, 2.2 to 9 at 32K; mrcr is the slowest, needles in noise are the fastest.
    Raises: KeyError for an unknown suite, ValueError under 512 tokens.
    """
    if length_tokens < MIN_TOKENS:
        raise ValueError(f"{length_tokens} tokens are too few: at least {MIN_TOKENS}")
    make = GENERATORS[suite]
    for attempt in range(MAX_ATTEMPTS):
        draw = Draw(f"{suite}/{split.value}/{length_tokens}/{seed}/{attempt}", split)
        task = make(draw, length_tokens, max(1, num_questions * (MAX_ATTEMPTS - attempt) // MAX_ATTEMPTS))
        needed = max(chat_tokens(messages(task, question), question.answer) for question in task.questions)
        if length_tokens * MIN_FILL <= needed <= length_tokens:
            return task
    raise AssertionError(f"no {suite} of {length_tokens} tokens in {MAX_ATTEMPTS} attempts: seed {seed}")
