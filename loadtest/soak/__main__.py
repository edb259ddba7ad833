"""`python -m loadtest.soak run`: soak and overload of a system that it starts; `faults`: the process faults.

Both add their rows to reliability.json and draw its table and picture. Ends with 1 when a promise was broken.
"""

import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer

from forepage.settings import SEEDED_MODEL
from loadtest.soak.phases import OverloadPlan, Row, SoakPlan, overload, soak
from loadtest.soak.results import write
from loadtest.soak.system import running_system

RESULTS = Path(__file__).parents[1] / "results"
PROPERTY = "reliability"
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def run(
    requests: Annotated[int, typer.Option(min=0, help="of the soak; 0: none is made")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="clients of the soak")] = 16,
    max_running: Annotated[int, typer.Option(min=1, help="sequences that the worker runs at once")] = 8,
    factor: Annotated[float, typer.Option(min=1.0, help="of the overload; 1: none is made")] = 4.0,
    window_s: Annotated[float, typer.Option(min=1.0, help="of the overload")] = 20.0,
    answer_scale: Annotated[int, typer.Option(min=1, help="length of answers: longer, larger batches")] = 1,
    seeded: Annotated[bool, typer.Option(help="random weights instead of the default model")] = False,
    seed: Annotated[int, typer.Option(help="of the traffic")] = 0,
    out: Annotated[Path, typer.Option(help="folder of reliability.json")] = RESULTS,
) -> None:
    """Start `forepage up` (FOREPAGE_* as set), soak it, then overload it."""
    limits = {
        "FOREPAGE_WORKER__MAX_RUNNING": str(max_running),
        "FOREPAGE_WORKER__MAX_WAITING": str(2 * max_running),
        "FOREPAGE_GATEWAY__MAX_CONCURRENT_REQUESTS": str(3 * max_running),
    }
    environ = limits | dict(os.environ)
    if seeded:
        environ["FOREPAGE_MODEL__PATH"] = str(SEEDED_MODEL)
    config = {name: value for name, value in environ.items() if name.startswith("FOREPAGE_")}
    if seeded:
        config["FOREPAGE_MODEL__PATH"] = SEEDED_MODEL.name

    async def measure() -> list[Row]:
        rows = []
        async with running_system(environ) as system:
            if requests:
                rows.append(await soak(system, SoakPlan(requests, concurrency, seed, answer_scale)))
                _tell(rows[-1])
                _write(out, rows, config)
            if factor > 1:
                plan = OverloadPlan(max_running, factor, window_s, seed + 2)
                rows.append(await overload(system, plan))
                _tell(rows[-1])
        return rows

    _finish(out, asyncio.run(measure()), config)


@app.command()
def faults(
    tests: Annotated[list[Path] | None, typer.Argument(help="files of tests that tell what they saw")] = None,
    out: Annotated[Path, typer.Option(help="folder of reliability.json")] = RESULTS,
) -> None:
    """Run the tests of process faults, and write down what each of them saw."""
    chosen = [str(path) for path in tests or [Path("tests/fault")]]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *chosen,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        failed = subprocess.run(command, check=False).returncode
        rows = _told(report)
    _finish(out, rows, {})
    if failed:
        raise typer.Exit(1)


def _told(report: Path) -> list[Row]:
    """What tests said of themselves (rigs/seen.py)."""
    rows: list[Row] = []
    for found in ElementTree.parse(report).iter("property"):
        if found.get("name") == PROPERTY:
            rows.append(json.loads(found.get("value") or "{}"))
    return rows


def _finish(out: Path, rows: list[Row], config: dict[str, Any]) -> None:
    _write(out, rows, config)
    if any(row["outcome"] != "kept" for row in rows):
        raise typer.Exit(1)


def _write(out: Path, rows: list[Row], config: dict[str, Any]) -> None:
    command = shlex.join(["python", "-m", "loadtest.soak", *told_arguments(sys.argv[1:])])
    write(out, rows, command=command, device=_device(), config=config)


def told_arguments(arguments: Sequence[str]) -> list[str]:
    """Those of a command that say what was measured: not `--out`, a path of the machine that ran it."""
    told, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            told.append(argument)
    return told


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _tell(row: Row) -> None:
    typer.echo(json.dumps(row))


if __name__ == "__main__":
    app()
