"""A step's tokens, made from the config, the stage, the step's number and the seed: the same on any machine.

numpy only: worker processes run `make_batch`.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from forepage.suites.registry import SUITES
from forepage.suites.task import Split
from forepage.training.backbone.chats import chat_document
from forepage.training.backbone.config import DataConfig, StageConfig
from forepage.training.backbone.documents import NO_QUESTION, PAD, REST, Document
from forepage.training.backbone.records import record_document

KINDS: tuple[str, ...] = ("rest", "records", "quotes", *SUITES)
KIND_IDS = {name: idx for idx, name in enumerate(KINDS)}
JUMPS = 4
MAX_JUMP = 200_000
JUMP_STEP = 4
JUMP_SHARE = 0.6
FLATTEN_FROM = 1024
FLATTEN_SHARE = 0.5
MAX_FLATTENING = 0.2


@dataclass(frozen=True)
class Batch:
    """Packed documents: arrays [n], aligned with the token that is read; the target is the token after it."""

    tokens: NDArray[np.uint16]
    targets: NDArray[np.uint16]
    weights: NDArray[np.float32]
    kinds: NDArray[np.uint8]  # of the target
    questions: NDArray[np.int32]  # of the target
    decisive: NDArray[np.bool_]  # whether the target is
    positions: NDArray[np.int32]
    flattening: NDArray[np.float32]


def make_batch(data: DataConfig, stage: StageConfig, stage_idx: int, step: int) -> Batch:
    """Documents of `stage.length` tokens that fill `stage.tokens`."""
    draw = np.random.default_rng((data.seed, stage_idx, step))
    documents, positions, flattening = [], [], []
    for _ in range(stage.tokens // stage.length):
        documents.append(_document(draw, data, stage))
        positions.append(_positions(draw, stage.length))
        flat = stage.length >= FLATTEN_FROM and draw.random() < FLATTEN_SHARE
        scale = 1 - MAX_FLATTENING * draw.random() if flat else 1.0
        flattening.append(np.full(stage.length, scale, np.float32))
    weights = (stage.rest_weight, stage.decisive_weight)
    return _packed(documents, np.concatenate(positions), np.concatenate(flattening), weights)


def test_batch(suite: str, length: int, tokens: int, seed: int) -> Batch:
    """Documents of the test split, at plain positions; only answers have weight."""
    draw = np.random.default_rng((seed, length, KIND_IDS[suite]))
    documents = []
    for number in range(tokens // length):
        if suite == "records":
            document = record_document(draw, length, KIND_IDS["records"])
        else:
            document = chat_document(draw, suite, length, KIND_IDS, Split.TEST).padded(length)
        questions = np.where(
            document.questions == NO_QUESTION, NO_QUESTION, document.questions + number * length
        )
        documents.append(replace(document, questions=questions.astype(np.int32)))
    positions = np.tile(np.arange(length, dtype=np.int32), len(documents))
    return _packed(documents, positions, np.ones(len(positions), np.float32), (0.0, 1.0))


def _document(draw: np.random.Generator, data: DataConfig, stage: StageConfig) -> Document:
    names = list(data.suites)
    shares = (
        np.array([data.suites[name] for name in names], float)
        * (1 - stage.records)
        / sum(data.suites.values())
    )
    pick = draw.random()
    if pick < stage.records or not names:
        return record_document(draw, stage.length, KIND_IDS["records"])
    place = int(np.searchsorted(np.cumsum(shares), pick - stage.records))
    suite = names[min(place, len(names) - 1)]
    return chat_document(draw, suite, stage.length, KIND_IDS, Split.TRAIN).padded(stage.length)


def _positions(draw: np.random.Generator, length: int) -> NDArray[np.int32]:
    """0, 1, 2, ... with a few leaps forward in most documents: all distances to a million are seen."""
    positions = np.arange(length, dtype=np.int64)
    if draw.random() < JUMP_SHARE:
        for place in draw.integers(length // JUMP_STEP, size=JUMPS):
            leap = int(MAX_JUMP * draw.random() ** 3) // JUMP_STEP * JUMP_STEP
            positions[place * JUMP_STEP :] += leap
    return positions.astype(np.int32)


def _packed(
    documents: list[Document],
    positions: NDArray[np.int32],
    flattening: NDArray[np.float32],
    rest_and_decisive_weight: tuple[float, float],
) -> Batch:
    """Targets are the next token of the same document; the last one has none."""
    rest_weight, decisive_weight = map(np.float32, rest_and_decisive_weight)
    tokens = np.concatenate([document.tokens for document in documents])
    last = np.cumsum([document.length for document in documents]) - 1
    targets = np.roll(tokens, -1)
    kinds = np.roll(np.concatenate([document.kinds for document in documents]), -1)
    questions = np.roll(np.concatenate([document.questions for document in documents]), -1)
    decisive = np.roll(np.concatenate([document.decisive for document in documents]), -1)
    weights = np.where(kinds == REST, rest_weight, np.where(decisive, decisive_weight, np.float32(1.0)))
    weights[targets == PAD] = 0.0
    weights[last] = 0.0
    kinds[last] = REST
    questions[last] = NO_QUESTION
    decisive[last] = False
    return Batch(tokens, targets, weights, kinds, questions, decisive, positions, flattening)
