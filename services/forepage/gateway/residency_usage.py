"""`usage.forepage`: the worker's residency report as plain JSON, and the request's wishes as a message."""

import math
from collections.abc import Sequence
from typing import Any

from forepage.gateway.schemas import ResidencyFields
from forepage.rpc import worker_pb2 as pb

JsonScalar = str | int | float | bool | None
JsonValue = JsonScalar | list[float] | list[int]
Report = dict[str, JsonValue]
"""One choice's report."""
ResidencyUsage = dict[str, JsonValue | list[Report | None]]
"""The first choice's report; with several, all of them as `per_choice`."""
MODE_PREFIX = "RESIDENCY_MODE_"
SOURCE_PREFIX = "PLAN_SOURCE_"
PHASE_PREFIX = "SEQUENCE_PHASE_"


def residency_usage(report: pb.ResidencyReport) -> Report:
    """Every field by its name; what was not measured is None, a mode is its word."""
    return plain_words(report)


def plain_words(message: pb.ResidencyReport | pb.DescribeReply | pb.WatchedSequence) -> Report:
    """Every field of a flat message but bytes, by its name; what is unset is None, an enum is its word."""
    fields = message.DESCRIPTOR.fields
    return {field.name: _plain(message, field) for field in fields if field.type != field.TYPE_BYTES}


def usage_of_choices(reports: Sequence[Report | None]) -> ResidencyUsage | None:
    """`usage.forepage` of an answer with these choices."""
    if len(reports) == 1:
        return None if reports[0] is None else {**reports[0]}
    return {**(reports[0] or {}), "per_choice": list(reports)}


def residency_wish(fields: ResidencyFields | None) -> pb.Residency:
    """What the request asks; unset means the worker's default."""
    if fields is None:
        return pb.Residency()
    return pb.Residency(
        mode=fields.mode and MODE_PREFIX + fields.mode.upper(),
        min_recall=fields.min_recall,
        budget_blocks=fields.budget_blocks,
        plan_source=fields.plan_source and SOURCE_PREFIX + fields.plan_source.upper(),
        threshold=fields.threshold,
        audit=bool(fields.audit),
        reads=bool(fields.reads),
    )


def _plain(report: Any, field: Any) -> JsonValue:
    if field.has_presence and not report.HasField(field.name):
        return None
    value = getattr(report, field.name)
    if not isinstance(value, str | int | float):  # a repeated field
        return [one if isinstance(one, int) else float(f"{one:.6g}") for one in value]
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return None if known is None else _word(known.name)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # a 32-bit float has 7 digits
    plain: JsonScalar = value
    return plain


def _word(name: str) -> str:
    """A mode, source or phase without what all of its kind begin with."""
    return name.removeprefix(MODE_PREFIX).removeprefix(SOURCE_PREFIX).removeprefix(PHASE_PREFIX).lower()
