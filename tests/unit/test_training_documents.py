"""Training texts: what decides an answer, words that are exchanged, and what the indexers are to learn."""

import numpy as np
import pytest
import torch

from forepage.suites.lexicon import lexicon
from forepage.suites.registry import SUITES, generate
from forepage.suites.task import Split, Task
from forepage.training.backbone.batches import KIND_IDS, make_batch
from forepage.training.backbone.chats import asked, decisive_places
from forepage.training.backbone.disguise import disguised
from forepage.training.backbone.documents import NO_QUESTION
from forepage.training.backbone.indexer_fit import evidence_entries, wanted_mass
from forepage.training.backbone.records import record_document
from rigs.tiny_training import training_config


def some_task(suite: str, seed: int = 3) -> Task:
    return generate(suite, length_tokens=1500, split=Split.TRAIN, seed=seed, num_questions=3)


@pytest.mark.parametrize("suite", SUITES)
def test_decisive_tokens_begin_the_facts_of_an_answer(suite: str) -> None:
    for question in some_task(suite).questions:
        places = list(decisive_places(question))
        assert places
        assert all(0 <= place < len(question.answer) for place in places)
        said = "".join(question.answer[place] for place in places)
        for fact in question.expected:
            if f"({fact})" in question.answer or fact in question.answer:
                assert fact[:3] in said


@pytest.mark.parametrize("suite", SUITES)
def test_chat_marks_answers_and_nothing_else(suite: str) -> None:
    task = some_task(suite)
    document = asked(task, 4096, KIND_IDS[suite]).document()
    text = bytes(np.where(document.tokens < 256, document.tokens, 0).astype(np.uint8)).decode("ascii")
    for number in np.unique(document.questions[document.questions != NO_QUESTION]):
        place = np.flatnonzero(document.questions == number)
        said = text[place[0] : place[-1]]  # its end token is part of it
        assert said in {question.answer for question in task.questions}
    assert not (document.decisive & (document.questions == NO_QUESTION)).any()
    assert (document.kinds != 0).sum() == (document.questions != NO_QUESTION).sum()


@pytest.mark.parametrize("suite", SUITES)
def test_disguise_keeps_layout_and_what_is_right(suite: str) -> None:
    task = some_task(suite)
    other = disguised(task, np.random.default_rng(7))
    for turn, new in zip(task.context, other.context, strict=True):
        assert len(new.text) == len(turn.text)
        same = [a == b or (a.isalpha() and b.isalpha()) for a, b in zip(turn.text, new.text, strict=True)]
        assert all(same), "digits, signs and spaces stay"
    words = "".join(turn.text for turn in other.context).lower()
    for question, new_question in zip(task.questions, other.questions, strict=True):
        assert len(new_question.answer) == len(question.answer)
        for fact, new_fact in zip(question.expected, new_question.expected, strict=True):
            assert (fact in question.answer) == (new_fact in new_question.answer)
            if fact.lower() in "".join(turn.text for turn in task.context).lower():
                assert new_fact.lower() in words


def test_disguise_exchanges_listed_words_and_the_same_ones_alike() -> None:
    task = some_task("ruler_niah_multikey_1")
    other = disguised(task, np.random.default_rng(0))
    text, new = task.context[-1].text, other.context[-1].text
    nouns = [noun for noun in lexicon(Split.TRAIN).nouns if len(noun) > 4 and text.count(f" {noun} ") > 1]
    assert nouns
    for noun in nouns:
        first = text.index(f" {noun} ") + 1
        second = text.index(f" {noun} ", first) + 1
        assert new[first : first + len(noun)] == new[second : second + len(noun)]
    assert sum(a != b for a, b in zip(text, new, strict=True)) > 50


def test_answers_to_records_stand_in_the_first_half() -> None:
    document = record_document(np.random.default_rng(4), 1536, KIND_IDS["records"])
    half = document.tokens[:768].tobytes()
    for number in np.unique(document.questions[document.questions != NO_QUESTION]):
        place = np.flatnonzero(document.questions == number)
        assert document.tokens[place].tobytes() in half
        assert document.decisive[place[:3]].all()


def test_batches_depend_on_seed_stage_and_step_alone() -> None:
    config = training_config()
    stage = config.stages[0]
    once, again, other = (make_batch(config.data, stage, 0, step) for step in (3, 3, 4))
    assert all(np.array_equal(getattr(once, name), getattr(again, name)) for name in ("tokens", "positions"))
    assert not np.array_equal(once.tokens, other.tokens)
    assert set(np.unique(once.weights)) <= {np.float32(0), np.float32(0.1), np.float32(1), np.float32(2)}
    assert (once.weights[once.decisive] == 2).all()
    assert (np.diff(once.positions) >= 1).all()


def test_indexers_learn_evidence_of_what_was_looked_up_alone() -> None:
    """One entry that holds a third of the attention, a hundred that share a tenth, the rest nothing."""
    plan = training_config().indexer
    share = torch.zeros(1, 4096)
    share[0, 7] = 0.33
    share[0, 100:200] = 0.001
    closed = torch.ones(1, 4096, dtype=torch.bool)
    closed[0, 4000:] = False
    wanted = wanted_mass(share, closed, plan)[0]
    assert wanted[7] == wanted.max()
    assert wanted[150] > wanted[300] > 0, "in order, so the top k takes them first"
    assert (wanted[4000:] == 0).all(), "what is not closed is never wanted"
    scores = torch.where(wanted > 0, wanted.log(), torch.tensor(-1e30)).unsqueeze(0)
    assert evidence_entries(scores, 512) == 1.0
    plain = torch.where(share > 0, share.log(), torch.tensor(-20.0))
    plain[0, 7] = -20.0  # nothing was looked up: attention's own softmax would name a hundred
    assert evidence_entries(plain, 100) == 100.0
    share[0, 7] = 0.0
    flat = wanted_mass(share, closed, plan)
    assert evidence_entries(torch.where(flat > 0, flat.log(), torch.tensor(-1e30)), 512) == 0.0
