"""Was what the model wanted resident? Merges an audit's scores and accumulates recall.

The worker scored its resident entries, the index the absent ones; together they are the model's own
ranking of all visible entries, equal scores going to the lower entry as they do there. *Evidence* are
the entries that alone hold at least 1 % of the softmax over the true top-k. Pure: the index merges here,
the worker accumulates here.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from forepage.errors import DependencyError, RequestError
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.kv.ids import BlockIdx

EVIDENCE_PROBABILITY = 0.01
Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class AuditVerdict:
    """One layer at one step, over the true top-k."""

    num_evidence: int
    num_evidence_resident: int
    missed_mass: float  # share of the softmax on absent entries, 0..1
    recall_at_k: float  # share of the top-k that was resident; 1 when nothing was visible
    missing: tuple[tuple[BlockIdx, float], ...]  # absent blocks with evidence, and its mass, by falling mass

    @property
    def evidence_recall(self) -> float | None:
        """Share of the evidence that was resident; None when no entry was evidence."""
        return self.num_evidence_resident / self.num_evidence if self.num_evidence else None


@dataclass(frozen=True)
class _Ranked:
    """One visible entry of either side."""

    entry: int
    score: float
    is_resident: bool


def merge_audit(
    resident: Iterable[tuple[int, float]], absent: Iterable[tuple[int, float]], *, topk: int
) -> AuditVerdict:
    """Rank resident and absent entries together and say what of the top-k was missing.

    Both sides are (entry, score) and may be cut to their own best `topk`, provided that the cut, too,
    keeps the lower of equal entries. Ranked by falling score; at equal scores (0.0 and -0.0 are equal)
    the lower entry comes first, which is how the model selects. A score of -inf is padding, whatever
    its entry.
    Raises: RequestError for topk < 1, a score that is NaN or +inf, an entry below 0 or named twice.
    """
    if topk < 1:
        raise RequestError(f"topk: must be at least 1, got {topk}", param="topk")
    ranked = [_Ranked(entry, score, True) for entry, score in _usable("resident", resident)]
    ranked += [_Ranked(entry, score, False) for entry, score in _usable("absent", absent)]
    ranked.sort(key=lambda one: (-one.score, one.entry))
    _check_unique(one.entry for one in ranked)
    return _verdict(ranked[:topk])


def _usable(name: str, pairs: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """The pairs without padding."""
    for entry, score in pairs:
        if math.isnan(score) or score == math.inf:
            raise RequestError(f"{name}: {score} is no score", param=name)
        if score == -math.inf:
            continue
        if entry < 0:
            raise RequestError(f"{name}: {entry} is no entry", param=name)
        yield entry, score


def _check_unique(entries: Iterable[int]) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry in seen:
            raise RequestError(f"entries: {entry} is named twice", param="entries")
        seen.add(entry)


def _verdict(top: Sequence[_Ranked]) -> AuditVerdict:
    """`top`: the true top-k in rank order."""
    if not top:
        return AuditVerdict(0, 0, missed_mass=0.0, recall_at_k=1.0, missing=())
    exps = [math.exp(one.score - top[0].score) for one in top]  # the maximum is exp(0) = 1: no overflow
    total = math.fsum(exps)
    missed: list[float] = []
    mass_by_block: dict[BlockIdx, float] = {}
    num_evidence = num_evidence_resident = num_resident = 0
    for exp, one in zip(exps, top, strict=True):
        probability = exp / total
        is_evidence = probability >= EVIDENCE_PROBABILITY
        num_evidence += is_evidence
        num_evidence_resident += is_evidence and one.is_resident
        num_resident += one.is_resident
        if not one.is_resident:
            missed.append(probability)
        if is_evidence and not one.is_resident:
            block = BlockIdx(one.entry // BLOCK_ENTRIES)
            mass_by_block[block] = mass_by_block.get(block, 0.0) + probability
    return AuditVerdict(
        num_evidence=num_evidence,
        num_evidence_resident=num_evidence_resident,
        missed_mass=min(1.0, math.fsum(missed)),
        recall_at_k=num_resident / len(top),
        missing=tuple(sorted(mass_by_block.items(), key=lambda item: (-item[1], item[0]))),
    )


@dataclass
class RecallEstimate:
    """Evidence recall over a sequence's audited steps: mean, minimum and how sure the mean is.

    One audited step is one observation, whatever its number of layers and entries: entries of a step
    are missed together (a block is absent for all of them), so counting each would feign certainty.
    """

    num_without_evidence: int = 0
    _recalls: list[float] = field(default_factory=list)

    def add_step(self, *, num_evidence: int, num_evidence_resident: int) -> float | None:
        """Add one audited step, its layers' counts summed; its recall, or None when it had no evidence.

        Raises: DependencyError unless 0 <= num_evidence_resident <= num_evidence.
        """
        if not 0 <= num_evidence_resident <= num_evidence:
            raise DependencyError(
                f"audit of the index: {num_evidence_resident} resident of {num_evidence} evidence entries"
            )
        if num_evidence == 0:
            self.num_without_evidence += 1
            return None
        recall = num_evidence_resident / num_evidence
        self._recalls.append(recall)
        return recall

    @property
    def num_steps(self) -> int:
        """Audited steps that had evidence: what mean, minimum and low95 are over."""
        return len(self._recalls)

    @property
    def steps(self) -> tuple[float, ...]:
        """The recall of each of them, in the order they were added."""
        return tuple(self._recalls)

    @property
    def newest(self) -> float | None:
        """The recall of the step that was added last."""
        return self._recalls[-1] if self._recalls else None

    @property
    def mean(self) -> float | None:
        """Mean recall of an audited step, each step counting the same."""
        return math.fsum(self._recalls) / len(self._recalls) if self._recalls else None

    @property
    def minimum(self) -> float | None:
        """The worst audited step."""
        return min(self._recalls, default=None)

    @property
    def low95(self) -> float | None:
        """Lower end of a 95 % interval of the mean: Wilson's, with the steps as the sample size.

        A step's recall lies in 0..1, so its variance is at most that of a coin with the same mean: the
        coin's interval errs on the wide side. Unlike a normal interval it does not shrink to a point
        while every step so far was perfect: 10 perfect steps give 0.72, 100 give 0.96. It holds for
        steps that are alike and independent; neighbouring steps are less than that.
        Source: E. B. Wilson, JASA 22 (1927), 209-212.
        """
        mean, count = self.mean, len(self._recalls)
        if mean is None:
            return None
        z2 = Z_95 * Z_95
        centre = mean + z2 / (2 * count)
        spread = Z_95 * math.sqrt(max(0.0, mean * (1 - mean)) / count + z2 / (4 * count * count))
        return min(mean, max(0.0, (centre - spread) / (1 + z2 / count)))
