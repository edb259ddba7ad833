"""Tasks of every suite: the same everywhere, as long as asked, answerable from the evidence they name."""

import hashlib
import json
import re
from dataclasses import asdict

import pytest

from forepage.suites.grading import grade
from forepage.suites.layout import chat_tokens
from forepage.suites.registry import SUITES, generate
from forepage.suites.task import Question, Split, Task, evidence_depth, messages, outside_last

LENGTHS = (512, 1024, 4096, 20_000)

GOLDEN = "3d004b0934e629b2149e79fc59efa64a89c5d0cd2e9a007394f226eebe97f5a8"
"""Of all suites together: changes only when a generator does, and then on purpose."""


def digest(task: Task) -> str:
    return hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()


def evidence_text(task: Task, question: Question) -> str:
    return "\n".join(task.context[span.turn].text[span.start : span.end] for span in question.evidence)


def facts_of(question: Question) -> tuple[str, ...]:
    """What the evidence must hold word for word."""
    if question.kind.startswith("choice_"):
        letter = f"({question.expected[0]}) "
        return (question.text.split(letter)[1].split("\n")[0].rstrip(),)
    if question.kind.startswith("mrcr_"):
        return question.expected[1:]
    return () if question.kind.endswith("_count") or question.kind == "abstention" else question.expected


def test_tasks_are_the_same_on_every_machine() -> None:
    digests = [
        digest(generate(suite, length_tokens=length, split=split, seed=7, num_questions=3))
        for suite in SUITES
        for split in Split
        for length in (1024, 6000)
    ]
    assert hashlib.sha256("".join(digests).encode()).hexdigest() == GOLDEN


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_differ_by_seed_split_and_length(suite: str) -> None:
    variants = [(1, Split.TRAIN, 2048), (2, Split.TRAIN, 2048), (1, Split.TEST, 2048), (1, Split.TRAIN, 4096)]
    tasks = [
        generate(suite, length_tokens=length, split=split, seed=seed) for seed, split, length in variants
    ]
    assert len({digest(task) for task in tasks}) == len(tasks)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("suite", SUITES)
def test_chat_fills_the_length_to_within_two_percent(suite: str, split: Split) -> None:
    for length in LENGTHS:
        for seed in range(6):
            task = generate(suite, length_tokens=length, split=split, seed=seed, num_questions=seed * 4 + 1)
            longest = max(chat_tokens(messages(task, one), one.answer) for one in task.questions)
            assert length * 0.98 <= longest <= length


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("suite", SUITES)
def test_answers_are_right_and_stand_in_the_evidence(suite: str, split: Split) -> None:
    for length in LENGTHS:
        for seed in range(6):
            task = generate(suite, length_tokens=length, split=split, seed=seed, num_questions=8)
            for question in task.questions:
                assert grade(question, question.answer) == 1.0
                assert grade(question, "") == 0.0 or question.expected == ("", "")
                assert bool(question.evidence) == (question.kind != "abstention")
                shown = evidence_text(task, question)
                assert [fact for fact in facts_of(question) if fact not in shown] == []


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("suite", SUITES)
def test_text_is_printable_ascii(suite: str, split: Split) -> None:
    task = generate(suite, length_tokens=8000, split=split, seed=3, num_questions=8)
    texts = [turn.text for turn in task.context] + [one.text + one.answer for one in task.questions]
    odd = {char for text in texts for char in text if not (char == "\n" or " " <= char <= "~")}
    assert odd == set()


@pytest.mark.parametrize("suite", SUITES)
def test_user_and_assistant_take_turns(suite: str) -> None:
    task = generate(suite, length_tokens=4096, split=Split.TEST, seed=5, num_questions=2)
    roles = [turn.role for turn in messages(task, task.questions[0])]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


@pytest.mark.parametrize("suite", SUITES)
def test_many_questions_share_one_long_context(suite: str) -> None:
    task = generate(suite, length_tokens=65_536, split=Split.TEST, seed=0, num_questions=32)
    assert len(task.questions) == 32
    assert len({(one.text, one.answer) for one in task.questions}) == 32


def test_needles_lie_at_all_depths() -> None:
    depths = []
    for seed in range(12):
        task = generate(
            "ruler_niah_single_2", length_tokens=16_384, split=Split.TEST, seed=seed, num_questions=16
        )
        depths += [depth for one in task.questions if (depth := evidence_depth(task, one)) is not None]
    assert min(depths) < 0.05
    assert max(depths) > 0.95
    assert abs(sum(depths) / len(depths) - 0.5) < 0.1


def test_outside_last_counts_what_comes_after_the_evidence() -> None:
    task = generate("longmemeval", length_tokens=20_000, split=Split.TEST, seed=1, num_questions=20)
    for question in task.questions:
        after = []
        for span in question.evidence:
            rest = [turn.text for turn in task.context[span.turn :]]
            after.append(len("".join(rest)) - span.end)
        assert outside_last(task, question, 8192) == (bool(after) and min(after) >= 8192)


def test_unknown_suite_and_short_length_are_refused() -> None:
    with pytest.raises(KeyError):
        generate("ruler_niah_single_4", length_tokens=4096, split=Split.TEST, seed=0)
    with pytest.raises(ValueError, match="too few"):
        generate("ruler_vt", length_tokens=511, split=Split.TEST, seed=0)


def test_needle_haystack_is_made_of_needles() -> None:
    task = generate("ruler_niah_multikey_3", length_tokens=16_384, split=Split.TEST, seed=2)
    marks = task.context[0].text.count("-4")
    assert marks > 16_384 / 150


def test_common_words_are_the_most_common() -> None:
    task = generate("ruler_cwe", length_tokens=16_384, split=Split.TEST, seed=4)
    counts: dict[str, int] = {}
    for word in task.context[0].text.split():
        counts[word] = counts.get(word, 0) + 1
    common = [word for word in sorted(counts, key=counts.__getitem__, reverse=True) if word.isalpha()][:10]
    assert set(common) == set(task.questions[0].expected)


@pytest.mark.parametrize("length", [512, 2048, 16_384])
def test_frequent_words_are_the_most_frequent_and_untied(length: int) -> None:
    for seed in range(10):
        task = generate("ruler_fwe", length_tokens=length, split=Split.TRAIN, seed=seed)
        span = task.questions[0].evidence[0]
        counts: dict[str, int] = {}
        for word in task.context[0].text[span.start : span.end].split():
            counts[word] = counts.get(word, 0) + 1
        ranked = sorted((word for word in counts if word != "...."), key=counts.__getitem__, reverse=True)
        assert tuple(ranked[:3]) == task.questions[0].expected
        assert counts[ranked[2]] > counts.get(ranked[3], 0) if len(ranked) > 3 else True


def test_repeated_requests_come_in_order() -> None:
    task = generate("mrcr", length_tokens=20_000, split=Split.TEST, seed=6, num_questions=10)
    for question in task.questions:
        at, request = question.evidence[0].turn, task.context[question.evidence[1].turn].text
        topic = question.expected[1].split("!")[0].split(" ", 1)[1]
        form = next(
            part for part in question.text.split(f" about {topic}")[0].split("the ")[-1].split(" ", 1)[1:]
        )
        form = form.removeprefix("(1 indexed) ")
        assert f"{form} about {topic}" in request
        same = [
            place + 1
            for place, turn in enumerate(task.context)
            if turn.role == "user" and re.search(rf" {form} about {topic}(?:[.?]|, please\.)$", turn.text)
        ]
        words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
        nth = same.index(at)
        assert (
            words[nth] in question.text
            or f"{nth + 1}{('st', 'nd', 'rd')[nth] if nth < 3 else 'th'}" in question.text
        )
