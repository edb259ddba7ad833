"""Training and test share no word, name, attribute or phrasing, except published prompt formats."""

import re

import pytest

from forepage.suites import registry
from forepage.suites.draw import Draw
from forepage.suites.lexicon import lexicon, split_of
from forepage.suites.pattern import Pattern, articled, patterns, plural
from forepage.suites.task import Split
from forepage.suites.wording import choices, counting, filler, memory, needles, reading, repeats, variables
from forepage.suites.wording.relations import RELATIONS

QUESTION_TABLES = {
    "needle": needles.QUESTIONS,
    "many needles": needles.MANY_QUESTIONS,
    "several needles": needles.MULTI_QUESTIONS,
    "variables": variables.QUESTIONS,
    "counting": counting.QUESTIONS,
    "repeats": repeats.QUESTIONS,
}


VALUES = "attribute kind key value name count list code nth form topic question choices number s o a b"


def drawn(pattern: Pattern, split: Split, times: int = 200) -> set[str]:
    draw = Draw("phrasings", split)
    return {pattern.expand(draw, {name: name.upper() for name in VALUES.split()}) for _ in range(times)}


def test_word_lists_are_disjoint_and_not_small() -> None:
    train, test = lexicon(Split.TRAIN), lexicon(Split.TEST)
    for kind in ("nouns", "adjectives", "verbs", "first_names", "occupations"):
        ours, theirs = set(getattr(train, kind)), set(getattr(test, kind))
        assert not ours & theirs
        assert min(len(ours), len(theirs)) >= 25
    assert not {word.lower() for word in train.nouns + train.adjectives} & set(test.nouns + test.adjectives)


@pytest.mark.parametrize("split", Split)
def test_made_up_words_belong_to_their_split(split: Split) -> None:
    draw = Draw("words", split)
    made = [draw.made_up(count) for count in (1, 2, 3) for _ in range(300)]
    names = [part for _ in range(100) for part in draw.person().split()]
    assert {split_of(word) for word in made + names} == {split}


def test_attributes_forms_and_introductions_are_disjoint() -> None:
    for kind, names in needles.ATTRIBUTES["train"].items():
        shared = set(names) & set(needles.ATTRIBUTES["test"][kind])
        assert all(name.startswith("special magic") for name in shared)
    assert set(repeats.FORMS["train"]) & set(repeats.FORMS["test"]) == {"poem", "short story"}


@pytest.mark.parametrize("name", QUESTION_TABLES)
def test_training_has_thirty_phrasings_of_a_question_and_the_test_others(name: str) -> None:
    table = QUESTION_TABLES[name]
    assert sum(pattern.count() for pattern in table["train"]) >= 30
    train = {said for pattern in table["train"] for said in drawn(pattern, Split.TRAIN)}
    test = {said for pattern in table["test"] for said in drawn(pattern, Split.TEST)}
    assert not train & test


TOPICS = (memory.USER_FACTS, memory.ASSISTANT_FACTS, memory.PREFERENCES, memory.COLLECTIONS, memory.UPDATES)


@pytest.mark.parametrize("topics", [*TOPICS, memory.EVENTS, tuple(RELATIONS.values())])
def test_facts_are_stated_and_asked_differently_in_the_test(topics: tuple[memory.Topic, ...]) -> None:
    for topic in topics:
        stated = getattr(topic, "said", None) or getattr(topic, "stated", None)
        assert stated is not None
        for wordings in (stated, topic.asked):
            assert not drawn(wordings["train"], Split.TRAIN) & drawn(wordings["test"], Split.TEST)


def test_filler_patterns_are_disjoint() -> None:
    for train, test in (filler.ESSAY, filler.NOTES, filler.TALK, filler.NOISE):
        assert not set(train) & set(test)
        assert len(test) >= 2


def test_published_formats_are_in_both_splits() -> None:
    found = dict.fromkeys(Split, 0)
    for split in Split:
        for seed in range(120):
            task = registry.generate("ruler_niah_single_2", length_tokens=1024, split=split, seed=seed)
            text, asked = task.context[0].text, task.questions[0].text
            keys = re.findall(r"One of the special magic numbers for ([\w-]+) is: \d{7}\.", text)
            published = "What is the special magic number for {} mentioned in the provided text?"
            if asked in map(published.format, keys):
                found[split] += 1
                assert text.startswith("A special magic number is hidden within the following text.")
    assert found[Split.TRAIN] >= 5
    assert found[Split.TEST] >= 40


def test_reading_and_choice_frames_are_disjoint() -> None:
    for table in (
        reading.FRAMES,
        reading.INTROS,
        choices.INTROS,
        counting.INTROS,
        variables.INTROS,
        needles.INTROS,
    ):
        train = {said for pattern in table["train"] for said in drawn(pattern, Split.TRAIN)}
        assert not train & {said for pattern in table["test"] for said in drawn(pattern, Split.TEST)}


def test_pattern_draws_every_alternative() -> None:
    pattern = Pattern("[The|A [big|small]|] {what} <noun>[.|!]")
    said = {
        text.rsplit(" ", 1)[0]
        for text in (pattern.expand(Draw(str(i), Split.TRAIN), {"what": "old"}) for i in range(99))
    }
    assert pattern.count() == 8
    assert said == {"The old", "A big old", "A small old", " old"}


@pytest.mark.parametrize("text", ["[a|b", "a]", "a|b", "[[a]"])
def test_pattern_refuses_brackets_that_do_not_match(text: str) -> None:
    with pytest.raises(ValueError, match="bracket"):
        Pattern(text)


def test_pattern_refuses_unknown_words_and_missing_values() -> None:
    with pytest.raises(KeyError):
        Pattern("<nothing>")
    with pytest.raises(KeyError):
        Pattern("{key}").expand(Draw("", Split.TRAIN))


def test_patterns_are_one_a_line() -> None:
    first, second = patterns("\none\\nline\ntwo\n")
    assert first.expand(Draw("", Split.TRAIN)) == "one\nline"
    assert second.expand(Draw("", Split.TRAIN)) == "two"


def test_articles_and_plurals_follow_the_letter() -> None:
    assert articled("a owl ate a fig. A idea, la era") == "an owl ate a fig. An idea, la era"
    assert [plural(word) for word in ("fox", "pony", "tray", "peach", "owl")] == [
        "foxes",
        "ponies",
        "trays",
        "peaches",
        "owls",
    ]
