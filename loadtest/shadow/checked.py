"""One answer beside what the second pass found of it, and the rows of the table."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from loadtest.shadow.measures import Measures


@dataclass(frozen=True)
class Checked:
    """An answer; `why_not` says why it could not be checked."""

    suite: str
    length_tokens: int
    arm: str
    residency: dict[str, Any]
    found: Measures | None
    why_not: str | None = None

    @property
    def evidence_recall(self) -> float | None:
        """Mean over its layers that had evidence, of all steps: what the answer's estimate is of."""
        return None if self.found is None else _mean(layer_recalls(self.found))

    @property
    def reported_recall(self) -> float | None:
        """What `usage.forepage` estimated for all layers."""
        value = self.residency.get("evidence_recall_estimate")
        return None if value is None else float(value)


def layer_recalls(found: Measures) -> Iterator[float]:
    """Of every step."""
    return (recall for step in found.layer_recall for recall in step)


def rows_of(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """One of each suite, length and arm; figures are over steps, each counting the same."""
    groups: dict[tuple[str, int, str], list[Checked]] = {}
    for one in checked:
        groups.setdefault((one.suite, one.length_tokens, one.arm), []).append(one)
    return [_row(*key, members) for key, members in groups.items()]


def _row(suite: str, length_tokens: int, arm: str, members: Sequence[Checked]) -> dict[str, Any]:
    found = [one.found for one in members if one.found is not None]
    recalls = [value for one in found for value in one.evidence_recall if value is not None]
    return {
        "suite": suite,
        "length_tokens": length_tokens,
        "arm": arm,
        "n": len(found),
        "not_checked": len(members) - len(found),
        "steps": sum(len(one.recall_at_k) for one in found),
        "evidence_recall": _mean(recall for one in found for recall in layer_recalls(one)),
        "evidence_recall_steps": _mean(recalls),
        "evidence_recall_p01": _first_percentile(recalls),
        "evidence_recall_estimate": _mean(_reported(members, "evidence_recall_estimate")),
        "evidence_recall_audited": _mean(_reported(members, "evidence_recall_mean")),
        "largest_difference": max(_differences(members), default=None),
        "golden_recall": _mean(value for one in found for value in one.golden_recall),
        "recall_at_k": _mean(value for one in found for value in one.recall_at_k),
        "missed_mass": _mean(value for one in found for value in one.missed_mass),
        "missed_mass_reported": _mean(_reported(members, "missed_mass_mean")),
        "missed_attention": _mean(value for one in found for value in one.missed_attention),
        "audited_share": _mean(_reported(members, "audited_share")),
    }


def _differences(members: Iterable[Checked]) -> Iterator[float]:
    for one in members:
        if one.evidence_recall is not None and one.reported_recall is not None:
            yield abs(one.evidence_recall - one.reported_recall)


def _reported(members: Iterable[Checked], name: str) -> Iterator[float]:
    for one in members:
        value = one.residency.get(name)
        if one.found is not None and value is not None:
            yield float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _first_percentile(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[0]
