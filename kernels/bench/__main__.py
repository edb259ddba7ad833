"""Measure every kernel at V4-Flash's sizes against this device's own limits.

    cd kernels && python -m bench --out bench          all kernels
    cd kernels && python -m bench --only sparse_decode

Each case is checked against its reference first; a wrong result ends the run.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer

from bench import flash
from bench.arena import registered_arena
from bench.attention import attention_cases
from bench.case import Call, Case, Timing
from bench.ceilings import measure_ceilings
from bench.prefill import prefill_cases
from bench.report import Row, result_row, table, write
from bench.scoring import scoring_cases
from bench.timing import time_us
from bench.transfers import transfer_cases
from bench.weights import weight_cases

ARENA_BYTES = 2 << 30
SEED = 0


def main(
    out: Annotated[Path | None, typer.Option(help="folder for results.json, .md and .png")] = None,
    only: Annotated[list[str] | None, typer.Option(help="kernels to measure; none: all")] = None,
) -> None:
    """Check, then time."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    device = torch.device("cuda", 0)
    torch.manual_seed(SEED)
    ceilings = measure_ceilings(device)
    rows: list[Row] = []
    with registered_arena(ARENA_BYTES) as arena, torch.inference_mode():
        groups = (
            transfer_cases(arena, device),
            scoring_cases(device),
            attention_cases(device),
            prefill_cases(device),
            weight_cases(device),
        )
        for cases in groups:
            for case in cases:
                if only and case.kernel not in only:
                    continue
                error = _checked(case)
                rows.append(
                    result_row(
                        case,
                        ceilings,
                        time_us=time_us(case.calls, case.timing),
                        torch_us=_plain_us(case.torch_call),
                        other_us=_plain_us(case.other_call),
                        error=error,
                    )
                )
                typer.echo(f"{case.kernel:18} {case.shape:52} {rows[-1]['time_us']:10.1f} us", err=True)
            torch.cuda.empty_cache()
    named = {name.value: value for name, value in ceilings.items()}
    typer.echo(table(rows, named))
    if out is not None:
        name = "-".join(("results", *(only or ())))  # those of some kernels don't take the place of all
        write(out, name, _result(rows, named, only))


def _checked(case: Case) -> float:
    """The check, on a stream like the one that is timed."""
    with torch.cuda.stream(torch.cuda.Stream()):
        error = case.check()
        torch.cuda.synchronize()
    return error


def _plain_us(call: Call | None) -> float | None:
    return None if call is None else time_us([call], Timing.STREAM)


def _result(rows: list[Row], ceilings: dict[str, float], only: list[str] | None) -> dict[str, object]:
    """In the shape that all committed measurements have."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "what": "kernels at V4-Flash sizes against the device's own limits",
        "command": "cd kernels && python -m bench --out bench" + "".join(f" --only {k}" for k in only or ()),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "ceilings": ceilings,
        "config": {"seed": SEED, "record_bytes": flash.RECORD_BYTES, "arena_bytes": ARENA_BYTES},
        "rows": rows,
    }


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    typer.run(main)
