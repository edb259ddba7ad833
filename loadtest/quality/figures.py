"""Answers as the rows of quality.json: accuracy, paired difference to `full`, and what paging did."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from loadtest.quality.answers import Answer
from loadtest.quality.arms import PAGED, Arm
from loadtest.quality.intervals import design_effect, mean_interval, paired_interval, percentile

Row = dict[str, Any]
SUBSETS: dict[str, Callable[[Answer], bool]] = {
    "all": lambda _: True,
    "inside_last_8k": lambda answer: answer.outside_tail is False,
    "outside_last_8k": lambda answer: answer.outside_tail is True,
}
NUM_DEPTHS = 10
"""Recall by depth is over so many equal parts of the context."""

WHY_NO_GOLDEN = "golden_recall: needs the attention mass of every entry, which a server does not compute"
WHY_NOT_PAGED = "evidence_recall, recall_at_k, missed_mass: nothing is absent in this arm"
WHY_NOT_AUDITED = "evidence_recall, recall_at_k, missed_mass: no audited step had evidence"
WHY_NO_REPORT = "all but accuracy: the endpoint sends no usage.forepage"
WHY_NO_PAIRS = "delta_to_full: no question was answered in both arms"
WHY_NOT_BYTES = "text_evidence_recall: the prompt's tokens are not bytes, or no block was absent"


def rows_of(answers: Iterable[Answer]) -> list[Row]:
    """A row for each suite, length, arm and subset that has questions."""
    cells: dict[tuple[str, int, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        cells[answer.suite, answer.length_tokens, answer.arm].append(answer)
    order = [arm.value for arm in Arm]
    rows = []
    for suite, length, arm in sorted(cells, key=lambda cell: (cell[0], cell[1], order.index(cell[2]))):
        full = {one.key: one.score for one in cells.get((suite, length, Arm.FULL.value), [])}
        for subset, belongs in SUBSETS.items():
            chosen = [one for one in cells[suite, length, arm] if belongs(one)]
            if chosen:
                rows.append(_row(suite, length, arm, subset, chosen, full))
    return rows


def depth_rows_of(answers: Iterable[Answer]) -> list[Row]:
    """Accuracy and recall by where in the context the evidence lies, over all suites."""
    cells: dict[tuple[int, str, int], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.depth is not None:
            part = min(NUM_DEPTHS - 1, int(answer.depth * NUM_DEPTHS))
            cells[answer.length_tokens, answer.arm, part].append(answer)
    return [
        {
            "length_tokens": length,
            "arm": arm,
            "depth_low": part / NUM_DEPTHS,
            "depth_high": (part + 1) / NUM_DEPTHS,
            "n": len(found),
            "accuracy": _rounded(fmean(one.score for one in found)),
            "evidence_recall": _rounded(_mean(_step_recalls(found))),
            "text_evidence_recall": _rounded(_mean(_text_recalls(found))),
        }
        for (length, arm, part), found in sorted(cells.items())
    ]


def _row(
    suite: str, length: int, arm: str, subset: str, answers: Sequence[Answer], full: dict[str, float]
) -> Row:
    scores = [one.score for one in answers]
    accuracy, low, high = mean_interval(
        scores, effect=design_effect(scores, [one.document for one in answers])
    )
    paired = [one for one in answers if one.key in full and arm != Arm.FULL]
    delta = _delta([one.score - full[one.key] for one in paired], [one.document for one in paired])
    recalls = list(_step_recalls(answers))
    intervals = _total(answers, "intervals")
    late = _total(answers, "late_plans")
    row: Row = {
        "suite": suite,
        "length_tokens": length,
        "arm": arm,
        "subset": subset,
        "n": len(answers),
        "documents": len({one.document for one in answers}),
        "errors": sum(one.error is not None for one in answers),
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "delta_to_full": delta[0],
        "delta_ci_low": delta[1],
        "delta_ci_high": delta[2],
        "kv_footprint": _mean(_reported(answers, "kv_footprint")),
        "footprint_flash": _mean(_reported(answers, "footprint_flash")),
        "c4_footprint": _mean(_reported(answers, "c4_footprint")),
        "chosen_blocks": _mean(_reported(answers, "chosen_blocks_mean")),
        "evidence_recall": _mean(recalls),
        "evidence_recall_p01": percentile(recalls, 0.01) if recalls else None,
        "text_evidence_recall": _mean(_text_recalls(answers)),
        "audited_share": _share(_total(answers, "audited_steps"), _total(answers, "paged_steps")),
        "golden_recall": None,
        "recall_at_k": _mean(_reported(answers, "recall_at_k_mean")),
        "missed_mass": _mean(_reported(answers, "missed_mass_mean")),
        "late_plans": _share(late, intervals),
        "escalations": _mean(_reported(answers, "escalations")),
        "moves_to_exact": _mean(_reported(answers, "moves_to_exact")),
        "full_by_size": _mean(_reported(answers, "full_by_size")),
        "full_by_room": _mean(_reported(answers, "full_by_room")),
    }
    row = {name: _rounded(value) for name, value in row.items()}
    return {**row, "why": "; ".join(_why(row, arm, answers)) or None}


def _delta(
    differences: Sequence[float], documents: Sequence[str]
) -> tuple[float, float, float] | tuple[None, None, None]:
    if not differences:
        return None, None, None
    return paired_interval(differences, effect=design_effect(differences, documents))


def _why(row: Row, arm: str, answers: Sequence[Answer]) -> Iterator[str]:
    """The reason for each missing figure."""
    if not any(one.residency for one in answers):
        yield WHY_NO_REPORT
        return
    yield WHY_NO_GOLDEN
    if row["evidence_recall"] is None:
        yield WHY_NOT_AUDITED if arm in PAGED else WHY_NOT_PAGED
    if row["text_evidence_recall"] is None:
        yield WHY_NOT_BYTES
    if row["delta_to_full"] is None and arm != Arm.FULL:
        yield WHY_NO_PAIRS


def _step_recalls(answers: Iterable[Answer]) -> Iterator[float]:
    """Evidence recall of every audited step."""
    for one in answers:
        yield from one.residency.get("evidence_recall_steps") or ()


def _text_recalls(answers: Iterable[Answer]) -> Iterator[float]:
    """Of each answer that was paged, the share of the blocks with the text's evidence that were resident."""
    for one in answers:
        resident = one.residency.get("resident_block_idx")
        if resident and one.evidence_blocks and one.byte_tokens == one.prompt_tokens:
            yield len(set(one.evidence_blocks) & set(resident)) / len(one.evidence_blocks)


def _reported(answers: Iterable[Answer], name: str) -> Iterator[float]:
    for one in answers:
        value = one.residency.get(name)
        if value is not None:
            yield float(value)


def _total(answers: Iterable[Answer], name: str) -> float | None:
    values = list(_reported(answers, name))
    return sum(values) if values else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
