"""`forepage status` as a terminal shows it, and as JSON for scripts."""

import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forepage.console.status import ProcessStatus, Status, WorkerStatus
from forepage.rpc import worker_pb2 as pb

GIB = 1 << 30
BAR_CELLS = 30
_SLOT_STATES = (("leased", "green"), ("cached", "cyan"), ("writing", "yellow"), ("free", "dim"))
_DEVICE_COLUMNS = (
    ("\ndevice", "left"),
    ("\nrow blocks", "right"),
    ("\nkey blocks", "right"),
    ("\nslots", "right"),
)
_SEQUENCE_COLUMNS = (
    ("request", "left"),
    ("phase", "left"),
    ("mode", "left"),
    ("prompt", "right"),
    ("cached", "right"),
    ("out", "right"),
    ("resident", "right"),
    ("footprint", "right"),
    ("recall", "right"),
    ("prefetch ms", "right"),
    ("late", "right"),
    ("escalated", "right"),
)


def status_view(status: Status) -> RenderableType:
    """Processes, devices, arena and sequences, one below the other."""
    parts: list[RenderableType] = [_head(status), _processes(status.processes)]
    if status.gpus or any(worker.described for worker in status.workers):
        parts.append(_devices(status))
    if status.arena is not None:
        parts.append(_arena(status))
    parts.append(_sequences(status.workers))
    return Group(*parts)


def status_json(status: Status) -> dict[str, Any]:
    """The same for scripts; messages of the protocol by its own field names."""
    return {
        "instance": status.instance,
        "version": status.version,
        "models": list(status.models),
        "ready": status.all_ready,
        "processes": [vars(process) for process in status.processes],
        "gpus": [vars(gpu) for gpu in status.gpus],
        "arena": _as_dict(status.arena) | {"bytes": status.arena_bytes} if status.arena else None,
        "workers": [
            {
                "address": worker.address,
                "described": _as_dict(worker.described) if worker.described else None,
                "sequences": [_as_dict(sequence) for sequence in worker.sequences],
            }
            for worker in status.workers
        ],
    }


def _as_dict(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def _head(status: Status) -> Text:
    parts = [f"forepage {status.version or ''}".strip(), f"instance {status.instance}"]
    if status.models:
        parts.append(", ".join(status.models))
    if status.card is not None:
        minutes = (time.time() - status.card.started_s) / 60
        parts += [
            f"`forepage up` for {minutes:,.0f} min (pid {status.card.pid})",
            f"in {status.card.run_dir}",
        ]
    else:
        parts.append("no `forepage up` of it on this host: asked where the settings say")
    return Text(" · ".join(parts) + "\n", style="bold")


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _processes(processes: tuple[ProcessStatus, ...]) -> Table:
    table = _table(("process", "left"), ("address", "left"), ("state", "left"), ("", "left"))
    for process in processes:
        state = (
            Text("ready", "green")
            if process.ready
            else Text("not ready" if process.detail else "down", "red")
        )
        table.add_row(process.role.value, process.address, state, process.detail)
    return table


def _devices(status: Status) -> RenderableType:
    table = _table(*_DEVICE_COLUMNS)
    for worker in status.workers:
        found = worker.described
        if found is not None:
            table.add_row(
                f"{found.worker_id} on {found.device}",
                _used(found.row_blocks_free, found.row_blocks_total),
                _used(found.key_blocks_free, found.key_blocks_total),
                _used(found.slots_free, found.max_running),
            )
    for gpu in status.gpus:
        memory = f"{gpu.used_bytes / GIB:,.1f} of {gpu.total_bytes / GIB:,.1f} GiB"
        table.add_row(f"GPU {gpu.index} {gpu.name}", memory, f"{gpu.utilization_percent} % busy", "")
    return table


def _used(free: int, total: int) -> str:
    return f"{total - free:,} of {total:,} used"


def _arena(status: Status) -> Text:
    arena = status.arena
    assert arena is not None
    size = "" if status.arena_bytes is None else f" of {status.arena_bytes / GIB:,.2f} GiB"
    text = Text(f"\narena{size}  ")
    counts = {name: int(getattr(arena, name)) for name, _ in _SLOT_STATES}
    for (name, style), cells in zip(_SLOT_STATES, _cells(list(counts.values()), arena.total), strict=True):
        text.append(("░" if name == "free" else "█") * cells, style=style)
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return text.append(f"  {said} slots; {arena.evictions:,} evicted, {arena.damaged:,} damaged\n")


def _cells(counts: list[int], total: int) -> list[int]:
    """Cells of a bar in proportion; what is not nothing has at least one, the last takes the rest."""
    cells = [max(1, BAR_CELLS * count // total) if count else 0 for count in counts[:-1]] if total else []
    cells = cells or [0] * (len(counts) - 1)
    return [*cells, max(0, BAR_CELLS - sum(cells))]


def _sequences(workers: tuple[WorkerStatus, ...]) -> RenderableType:
    sequences = [sequence for worker in workers for sequence in worker.sequences]
    if not sequences:
        return Text("\nno sequence is running", style="dim")
    table = _table(*_SEQUENCE_COLUMNS)
    for one in sequences:
        resident = sum(byte.bit_count() for byte in one.resident)
        table.add_row(
            one.request_id,
            _word(pb.SequencePhase.Name(one.phase)),
            _word(pb.ResidencyMode.Name(one.mode)),
            f"{one.prompt_tokens:,}",
            f"{one.cached_tokens:,}",
            f"{one.generated_tokens:,}",
            f"{resident:,} of {one.num_blocks:,}",
            f"{one.kv_footprint:.0%}" if one.HasField("kv_footprint") else "",
            f"{one.evidence_recall:.2f}" if one.HasField("evidence_recall") else "",
            f"{one.prefetch_latency_ms:,.1f}" if one.HasField("prefetch_latency_ms") else "",
            f"{one.late_plans:,}",
            f"{one.escalations:,}",
        )
    return table


def _word(name: str) -> str:
    """An enum's last word: SEQUENCE_PHASE_DECODE is decode."""
    for prefix in ("SEQUENCE_PHASE_", "RESIDENCY_MODE_"):
        name = name.removeprefix(prefix)
    return name.lower()
