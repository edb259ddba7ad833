"""What of an answer's evidence was resident, by brute force: each layer of each step, over all there was.

Evidence, recall at k and missed mass are what they are in audits. Golden is the paper's label: entries of the
60 % mass set in at least three layers. Missed attention is the model's own: no indexer takes part. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.training.indexer.golden import golden_entries
from loadtest.shadow.full_pass import Looked

GOLDEN_MASS = 0.6
GOLDEN_LAYERS = 3


@dataclass(frozen=True)
class Measures:
    """Of one answer, by step: None where it had no such entry; `layer_recall`: of layers with evidence."""

    evidence_recall: tuple[float | None, ...]
    golden_recall: tuple[float | None, ...]
    recall_at_k: tuple[float, ...]
    missed_mass: tuple[float, ...]
    missed_attention: tuple[float, ...]
    layer_recall: tuple[tuple[float, ...], ...]


def resident_sets(residency: dict[str, Any], num_steps: int) -> list[frozenset[int]]:
    """Of each decode step, from the answer's `usage.forepage`.

    Raises: ValueError when it does not cover the steps.
    """
    steps: Sequence[int] = residency.get("resident_set_step") or ()
    if not steps or steps[0] != 1:
        raise ValueError("the answer does not say what was resident: was it asked with `audit`?")
    sizes, blocks = residency["resident_set_size"], residency["resident_set_block_idx"]
    sets = [frozenset(blocks[begin:end]) for begin, end in pairwise(accumulate(sizes, initial=0))]
    ends = [*steps[1:], num_steps + 1]
    return [
        sets[at] for at, (begin, end) in enumerate(zip(steps, ends, strict=True)) for _ in range(begin, end)
    ]


def measure(looked: Looked, sets: Sequence[frozenset[int]]) -> Measures:
    """Step by step; `sets` has as many as the answer has tokens."""
    rows = list(_steps(looked, sets))
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), (), (), ()]
    return Measures(*columns)


def _steps(
    looked: Looked, sets: Sequence[frozenset[int]]
) -> Iterator[tuple[float | None, float | None, float, float, float, tuple[float, ...]]]:
    """evidence recall, golden recall, recall at k, missed mass, missed attention, recall by layer."""
    for step, blocks in enumerate(sets):
        selected, scores = looked.selected[step], looked.scores[step].double()  # [C, k]
        is_entry = selected >= 0
        is_there = torch.isin(selected // BLOCK_ENTRIES, torch.tensor(sorted(blocks))) & is_entry
        shares = scores.masked_fill(~is_entry, float("-inf")).softmax(dim=1).nan_to_num(0.0)
        is_evidence = (shares >= EVIDENCE_PROBABILITY) & is_entry
        missed = (shares * ~is_there).sum(dim=1)
        attention = looked.attention[step].double()
        yield (
            _share(is_evidence & is_there, is_evidence),
            _golden_recall(selected, looked.scores[step], blocks),
            _share(is_there, is_entry, of_none=1.0) or 0.0,
            float(missed.mean()),
            float((attention * ~is_there).sum(dim=1).mean()),
            tuple(
                share
                for there, all_ in zip(is_evidence & is_there, is_evidence, strict=True)
                if (share := _share(there, all_)) is not None
            ),
        )


def _golden_recall(selected: Tensor, scores: Tensor, blocks: frozenset[int]) -> float | None:
    """Of entries in the mass set of enough layers; a model of fewer layers needs them all."""
    golden = golden_entries(selected, scores, mass=GOLDEN_MASS)
    entries, votes = golden.entries[golden.in_mass_set(GOLDEN_MASS)].unique(return_counts=True)
    elected = entries[votes >= min(GOLDEN_LAYERS, selected.shape[0])]
    there = [int(entry) // BLOCK_ENTRIES in blocks for entry in elected]
    return sum(there) / len(there) if there else None


def _share(part: Tensor, whole: Tensor, of_none: float | None = None) -> float | None:
    count = int(whole.sum())
    return int(part.sum()) / count if count else of_none
