"""The residency report of an ended sequence, as the gateway shows it in `usage.forepage`."""

from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.telemetry import MetricName, set_attributes
from forepage.worker.parts import WorkerParts
from forepage.worker.request import PROTO_OF_MODE
from forepage.worker.sequence import Sequence


def residency_report(parts: WorkerParts, sequence: Sequence) -> pb.ResidencyReport:
    """Everything that was counted; also records the request's mean footprint."""
    report = sequence.report
    could_page = sequence.request.mode is not ResidencyMode.FULL
    never_paged = report.paged_steps == 0 and report.exact_steps == 0
    by_room = sequence.was_full_by_room
    by_size = could_page and never_paged and not by_room
    if by_room or by_size:
        set_attributes(sequence.span, kept_full="room" if by_room else "size")
    if report.footprint.value is not None:
        parts.telemetry.record(
            MetricName.KV_FOOTPRINT, report.footprint.value, mode=sequence.request.mode.value
        )
    return report.message(
        sequence.request,
        final_mode=PROTO_OF_MODE[sequence.mode_now],
        full_by_size=by_size,
        full_by_room=by_room,
        budget=max(report.budget_max, sequence.request.budget_blocks),
        slack=parts.settings.load_slack_blocks + parts.settings.load_lent_blocks,
        num_layers=len(parts.geometry.c4_layers),
    )
