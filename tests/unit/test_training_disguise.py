"""Made-up words: only listed ones are exchanged, each for one other, and no word of the test is ever seen."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from forepage.suites import wording
from forepage.suites.lexicon import lexicon
from forepage.suites.registry import SUITES, generate
from forepage.suites.task import Split, Task
from forepage.suites.wording.needles import ATTRIBUTES
from forepage.training.backbone import batches
from forepage.training.backbone.disguise import WORD, disguised
from rigs.tiny_training import training_config

SORTS = ("nouns", "adjectives", "first_names", "occupations")
ANY_WORD = re.compile(r"[A-Za-z]+")


def words_of_lists(split: Split) -> set[str]:
    words = lexicon(split)
    return {word.lower() for sort in SORTS for word in getattr(words, sort)}


TRAIN, TEST = words_of_lists(Split.TRAIN), words_of_lists(Split.TEST)
EXCHANGED = TRAIN | {
    part for names in ATTRIBUTES["train"].values() for name in names for part in name.split()
}
"""What may be exchanged: listed words, and words of attributes' names."""


def some_task(suite: str, seed: int = 5) -> Task:
    return generate(suite, length_tokens=2000, split=Split.TRAIN, seed=seed, num_questions=4)


def texts(task: Task) -> list[str]:
    """All that is said, and what is right, in order."""
    said = [turn.text for turn in task.context]
    for question in task.questions:
        said += [question.text, question.answer, *question.expected]
    return said


def exchanges(task: Task, other: Task) -> dict[str, set[str]]:
    """Of each word of the context, in lower case, what stands in its place."""
    found: dict[str, set[str]] = defaultdict(set)
    for turn, new in zip(task.context, other.context, strict=True):
        for match in WORD.finditer(turn.text):
            found[match.group().lower()].add(new.text[match.start() : match.end()].lower())
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_a_word_that_is_in_no_list_stays_and_one_that_is_has_one_other(suite: str) -> None:
    changed = 0
    for seed in range(3):
        task = some_task(suite, seed)
        for word, others in exchanges(task, disguised(task, np.random.default_rng(seed))).items():
            stem = word if word in EXCHANGED or word[-1] != "s" else word[:-1]
            assert len(others) == 1, word
            (other,) = others
            assert len(other) == len(word)
            if stem not in EXCHANGED:
                assert other == word
            changed += other != word
    assert changed > 0 or suite == "ruler_fwe", "its words are made up already"


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_no_word_stays_letter_by_letter(suite: str) -> None:
    """Codes, ids, numbers, signs and the shape of capitals: outside words nothing changes."""
    task = some_task(suite)
    other = disguised(task, np.random.default_rng(2))
    for text, new in zip(texts(task), texts(other), strict=True):
        assert len(new) == len(text)
        assert WORD.sub("~", new) == WORD.sub("~", text)
        assert [letter.isupper() for letter in new] == [letter.isupper() for letter in text]


@pytest.mark.parametrize("suite", SUITES)
def test_facts_that_stand_in_the_context_still_do(suite: str) -> None:
    standing = 0
    for seed in range(3):
        task = some_task(suite, seed)
        other = disguised(task, np.random.default_rng(seed))
        context, new_context = ("\n".join(turn.text for turn in each.context) for each in (task, other))
        for question, new in zip(task.questions, other.questions, strict=True):
            for fact, new_fact in zip(question.expected, new.expected, strict=True):
                assert (new_fact in new_context) == (fact in context), fact
                assert (new_fact in new.answer) == (fact in question.answer), fact
                standing += fact in context
            assert (new.evidence, new.kind) == (question.evidence, question.kind)
    assert standing or suite in ("ruler_cwe", "ruler_fwe", "longbench", "mrcr")


def test_a_task_is_disguised_by_its_draw_alone() -> None:
    task = some_task("longmemeval")
    once, again, other = (disguised(task, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert once != task


COMMON = 5
"""Letters of a word that made-up ones are not likely to be by chance."""


def words_in(tokens: np.ndarray) -> set[str]:
    text = bytes(np.where(tokens < 256, tokens, 32).astype(np.uint8)).decode("latin-1")
    return {word.lower() for word in ANY_WORD.findall(text)}


def words_of_phrases() -> set[str]:
    """Plain words of the suites' sentences, which both splits may say; the lists' files are left out."""
    folder = Path(wording.__file__).parent
    files = [path for path in folder.glob("*.py") if path.stem not in ("nouns", "words")]
    return {word.lower() for path in files for word in ANY_WORD.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("seed", range(2))
def test_texts_of_training_and_test_share_no_listed_word(seed: int) -> None:
    """Words to look up. A listed word of the other split may only be one that a fixed sentence has."""
    config = training_config(
        data__seed=seed,
        data__suites=dict.fromkeys(SUITES, 1.0),
        stage__records=0.0,
        stage__tokens=32768,
        stage__length=4096,
    )
    trained: set[str] = set()
    for step in range(6):
        trained |= words_in(batches.make_batch(config.data, config.stages[0], 0, step).tokens)
    tested: set[str] = set()
    for suite in SUITES:
        tested |= words_in(batches.test_batch(suite, 4096, 8192, seed).tokens)
    assert len(tested & TEST) > 100
    assert len(trained & TRAIN) > 100
    phrases = words_of_phrases()
    assert {word for word in trained & TEST if len(word) >= COMMON} <= phrases
    assert {word for word in tested & TRAIN if len(word) >= COMMON} <= phrases
