"""Teacher-forced exact match: a question is right when every token of its answer is the likeliest one.

Texts are the test split's, whose words, names and templates training never sees. One text carries many
questions, each with the right answers to the earlier ones before it; `loadtest` measures a served model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forepage.suites.registry import SUITES
from forepage.training.backbone.batch_stream import Feeder
from forepage.training.backbone.batches import Batch, test_batch
from forepage.training.backbone.config import EvaluationConfig
from forepage.training.backbone.documents import NO_QUESTION
from forepage.training.backbone.network import Backbone, Inputs
from forepage.training.backbone.packing import Packing


@dataclass(frozen=True)
class Score:
    """Of one suite at one length."""

    suite: str
    length_tokens: int
    n: int
    exact_match: float
    token_accuracy: float


class Evaluation:
    """A network's scores; inputs and packing of `config.tokens` tokens are kept for all of them.

    `sparse`: c4 layers attend what their indexers choose, as when served.
    """

    def __init__(self, network: Backbone, config: EvaluationConfig, *, sparse: bool = False) -> None:
        device, spec = network.embedding.device, network.spec
        self._network = network
        self._config = config
        self._sparse = sparse
        self._inputs = Inputs.empty(config.tokens, device)
        self._packing = Packing(
            config.tokens, spec.compress_ratios, window_tokens=spec.window_tokens, device=device
        )
        self._feeder = Feeder(self._inputs, buffers=1)

    def scores(
        self, suites: Sequence[str] = ("records", *SUITES), *, fp8_rows: bool = True
    ) -> Iterator[Score]:
        """Length by length, suite by suite."""
        config = self._config
        self._inputs.fp8_share.fill_(float(fp8_rows))
        for length in config.lengths:
            self._packing.pack([length] * (config.tokens // length))
            for suite in suites:
                rights, tokens = [], []
                for step in range(config.steps):
                    batch = test_batch(suite, length, config.tokens, config.seed + step)
                    right, correct = self._answered(batch)
                    rights.append(right)
                    tokens.append(correct)
                exact, accuracy = np.concatenate(rights), np.concatenate(tokens)
                yield Score(suite, length, len(exact), float(exact.mean()), float(accuracy.mean()))

    def _answered(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Which questions are right, bool [questions]; which answers' tokens are, bool [tokens]."""
        self._feeder.feed(batch)
        # With gradients on, though none is taken: the compiled training code is used, no other is made.
        streams, _ = self._network(self._inputs, self._packing, sparse=self._sparse)
        _, right = self._network.head.losses(streams, self._inputs.targets)
        correct = right.cpu().numpy()
        asked = batch.questions != NO_QUESTION
        _, number = np.unique(batch.questions[asked], return_inverse=True)
        wrong = np.bincount(number, weights=~correct[asked])
        return wrong == 0, correct[asked]


def table(scores: Sequence[Score]) -> str:
    """Markdown: a suite a row, a length a column."""
    lengths = sorted({score.length_tokens for score in scores})
    by_place = {(score.suite, score.length_tokens): score for score in scores}
    lines = ["| suite | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for suite in dict.fromkeys(score.suite for score in scores):
        found = [by_place.get((suite, length)) for length in lengths]
        cells = [f"{score.exact_match:.3f} ({score.n})" if score else "" for score in found]
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def free_memory() -> None:
    """Give cached blocks back, before a step of another size."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
