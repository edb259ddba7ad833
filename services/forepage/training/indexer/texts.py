"""The dump's texts: chats of the suites with many questions each, in a fixed order, made from the seed alone.

All are of the training split; a validation text differs from every other in its seed. numpy only.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from forepage.suites.task import Split
from forepage.training.backbone.batches import KIND_IDS
from forepage.training.backbone.chats import chat_document
from forepage.training.backbone.documents import NO_QUESTION, Document
from forepage.training.indexer.config import DumpConfig
from forepage.training.indexer.features import TextId
from forepage.training.indexer.served_pass import Text

NO_ANSWER = -1


def text_ids(config: DumpConfig) -> Iterator[TextId]:
    """Every text of the dump; lengths in turn by their counts, so that any beginning has all of them."""
    draw = np.random.default_rng(config.seed)
    names = list(config.suites)
    shares = np.array([config.suites[name] for name in names], float)
    shares /= shares.sum()
    total = sum(config.texts)
    due = sorted(
        ((number + 0.5) / count, place) for place, count in enumerate(config.texts) for number in range(count)
    )
    is_validation = np.zeros(total, bool)
    every = round(1 / config.validation_share)
    seen = [0] * len(config.lengths)
    for number, (_, place) in enumerate(due):
        # The first of each length is one: a dump that was stopped early can be validated too.
        is_validation[number] = seen[place] % every == 0
        seen[place] += 1
    for number, (_, place) in enumerate(due):
        suite = names[int(draw.choice(len(names), p=shares))]
        yield TextId(suite, config.lengths[place], config.seed * total + number, bool(is_validation[number]))


def make_text(text: TextId, *, max_rows: int) -> Text:
    """The chat of an id, cut behind its last answer; its answers spread evenly, as many as give max_rows."""
    draw = np.random.default_rng(text.seed)
    document = chat_document(draw, text.suite, text.length_tokens, KIND_IDS, Split.TRAIN)
    answers = _next_answers(document)
    last = int(np.flatnonzero(answers != NO_ANSWER)[-1])
    kept = _spread(answers, max_rows)
    return Text(text, document.tokens[: last + 1].astype(np.int64), kept[: last + 1])


def _next_answers(document: Document) -> NDArray[np.int32]:
    """For each token the question whose answer the next token is part of."""
    following = np.append(document.questions[1:], np.int32(NO_QUESTION))
    return np.where(following == NO_QUESTION, NO_ANSWER, following).astype(np.int32)


def _spread(answers: NDArray[np.int32], max_rows: int) -> NDArray[np.int32]:
    """Leave out every so-manieth answer until the others have at most `max_rows` tokens; one always stays."""
    numbers, counts = np.unique(answers[answers != NO_ANSWER], return_counts=True)
    wanted = max(1, int(len(numbers) * min(1.0, max_rows / counts.sum())))
    picked = np.linspace(0, len(numbers) - 1, wanted).round().astype(int)
    while counts[picked].sum() > max_rows and len(picked) > 1:
        picked = picked[:-1]
    return np.where(np.isin(answers, numbers[picked]), answers, NO_ANSWER).astype(np.int32)
