"""Batches: made from seed, stage and step alone; what is learned from, how much, and at which positions."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from forepage.training.backbone import batches
from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import JUMP_STEP, JUMPS, MAX_FLATTENING, MAX_JUMP, Batch, make_batch
from forepage.training.backbone.config import DataConfig, StageConfig
from forepage.training.backbone.documents import NO_QUESTION, PAD, REST
from forepage.training.backbone.network import Inputs
from rigs.tiny_training import CPU, training_config

LENGTH, TOKENS = 1024, 8192


def batch_of(
    step: int = 0, *, stage_idx: int = 0, seed: int = 2, records: float = 0.5, length: int = LENGTH
) -> Batch:
    data, stage = plan(seed=seed, records=records, length=length)
    return make_batch(data, stage, stage_idx, step)


def plan(seed: int = 2, records: float = 0.5, length: int = LENGTH) -> tuple[DataConfig, StageConfig]:
    config = training_config(
        data__seed=seed, stage__length=length, stage__tokens=TOKENS, stage__records=records
    )
    return config.data, config.stages[0]


def by_document(values: NDArray[np.generic], length: int = LENGTH) -> NDArray[np.generic]:
    return values.reshape(-1, length)


def equal(one: Batch, other: Batch) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch)
    )


def test_a_batch_is_given_by_seed_stage_and_step() -> None:
    assert equal(batch_of(3), batch_of(3))
    for other in (batch_of(4), batch_of(3, stage_idx=1), batch_of(3, seed=1)):
        assert not np.array_equal(batch_of(3).tokens, other.tokens)


def test_workers_make_the_same_batches_in_the_same_order() -> None:
    """From any step on; two spawned processes against this one."""
    config = training_config(data__workers=2, stage__length=512, stage__tokens=1024)
    stage = config.stages[0]
    with BatchStream(config.data) as stream, stream.stage(stage, 0, 5) as made:
        for step in range(5, 12):
            assert equal(next(made), make_batch(config.data, stage, 0, step))


@pytest.mark.parametrize("records", [0.0, 0.5, 1.0])
def test_targets_are_the_next_tokens_of_the_same_document(records: float) -> None:
    batch = batch_of(records=records)
    tokens, targets = by_document(batch.tokens), by_document(batch.targets)
    assert np.array_equal(targets[:, :-1], tokens[:, 1:])
    last = by_document(np.arange(TOKENS))[:, -1]
    assert not batch.weights[last].any()
    assert (batch.questions[last] == NO_QUESTION).all()
    assert not batch.decisive[last].any()
    assert not batch.kinds[last].any()


@pytest.mark.parametrize("records", [0.0, 1.0])
def test_weights_say_what_is_learned(records: float) -> None:
    """A pad nothing, what is no answer a little, an answer 1, its decisive tokens more."""
    batch = batch_of(records=records)
    last = np.zeros(TOKENS, bool)
    last[LENGTH - 1 :: LENGTH] = True
    is_pad = batch.targets == PAD
    is_answer = batch.kinds != REST
    assert np.array_equal(is_answer, batch.questions != NO_QUESTION)
    assert not batch.decisive[~is_answer].any()
    for chosen, weight in (
        (last | is_pad, 0.0),
        (~last & ~is_pad & ~is_answer, 0.1),
        (is_answer & ~batch.decisive, 1.0),
        (batch.decisive, 2.0),
    ):
        assert np.array_equal(batch.weights[chosen], np.full(chosen.sum(), weight, np.float32))
    assert batch.decisive.sum() > 10
    assert is_pad.any() or records


def test_shares_of_records_and_suites_are_as_asked() -> None:
    kinds = [batch_of(step, records=0.25, length=512).kinds.reshape(-1, 512) for step in range(8)]
    documents = [set(row.tolist()) - {0} for batch in kinds for row in batch]
    ids = batches.KIND_IDS
    records = sum(ids["records"] in document for document in documents)
    needles = sum(ids["ruler_niah_single_2"] in document for document in documents)
    memory = sum(ids["longmemeval"] in document for document in documents)
    assert records + needles + memory == len(documents) == 128
    # Binomial with n = 128: five standard deviations.
    assert abs(records - 32) < 5 * 4.9
    assert abs(needles - 48) < 5 * 5.5


def test_positions_leap_forward_in_whole_entries() -> None:
    """At multiples of 4, by multiples of 4: an entry's tokens stay together."""
    leaping = total = 0
    largest = 0
    for step in range(8):
        for row in by_document(batch_of(step).positions):
            steps = np.diff(row.astype(np.int64)) - 1
            places = np.flatnonzero(steps) + 1
            assert (steps >= 0).all()
            assert len(places) <= JUMPS
            assert not (places % JUMP_STEP).any()
            assert not (steps % JUMP_STEP).any()
            assert row[0] % JUMP_STEP == 0
            assert row[-1] <= LENGTH + JUMPS * MAX_JUMP
            leaping += len(places) > 0 or row[0] > 0
            largest = max(largest, int(row[-1]))
            total += 1
    assert 0.4 < leaping / total < 0.8
    assert largest > 100_000


def test_attention_is_flattened_in_half_of_the_long_documents() -> None:
    long = np.concatenate([by_document(batch_of(step).flattening) for step in range(8)])
    assert (long == long[:, :1]).all(), "one factor a document"
    assert ((long > 1 - MAX_FLATTENING) & (long <= 1)).all()
    assert 0.25 < (long[:, 0] < 1).mean() < 0.75
    assert (batch_of(length=512).flattening == 1).all()


@pytest.mark.parametrize("suite", ["records", "longmemeval", "ruler_cwe"])
def test_a_test_batch_counts_answers_alone_each_its_own_question(suite: str) -> None:
    batch = batches.test_batch(suite, LENGTH, TOKENS, seed=3)
    assert equal(batch, batches.test_batch(suite, LENGTH, TOKENS, seed=3))
    assert np.array_equal(batch.weights > 0, batch.questions != NO_QUESTION)
    assert np.array_equal(batch.positions, np.tile(np.arange(LENGTH), TOKENS // LENGTH))
    assert (batch.flattening == 1).all()
    runs = np.flatnonzero(np.diff(batch.questions, prepend=NO_QUESTION, append=NO_QUESTION))
    numbers = [batch.questions[place] for place in runs if place < TOKENS]
    asked = [number for number in numbers if number != NO_QUESTION]
    assert len(set(asked)) == len(asked), "a number twice would count two questions as one"


def test_feeder_fills_the_inputs() -> None:
    inputs = Inputs.empty(TOKENS, CPU)
    feeder = Feeder(inputs, buffers=2)
    for step in range(3):
        batch = batch_of(step)
        feeder.feed(batch)
        for name in ("tokens", "targets", "weights", "kinds", "decisive", "positions", "flattening"):
            filled = getattr(inputs, name)
            assert torch.equal(filled, torch.from_numpy(getattr(batch, name)).to(filled.dtype)), name
