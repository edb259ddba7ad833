"""`python -m loadtest.throughput --out loadtest/results`: sequences that fit and tokens a second, by arm.

Arms that hold as much share a cold pool, an index and a worker, and a GPU memory divided for them; the
history is written straight into the cold pool. A case that fails leaves a row that says why, and the next one
goes on.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import torch

from forepage.errors import ForepageError
from forepage.settings import ModelSettings
from forepage.worker.assembly import ModelFolder
from loadtest.quality.report import commit_of_tree
from loadtest.throughput.case import Arm, Case, Plan
from loadtest.throughput.ceilings import link_ceilings
from loadtest.throughput.measure import Length, Window, WindowError, measure
from loadtest.throughput.model import INDEX_FILE, model_config, write_model
from loadtest.throughput.report import write
from loadtest.throughput.rows import Row, row_of
from loadtest.throughput.system import StartError, running_system

FOOTPRINTS = {65_536: 0.25, 131_072: 0.145, 262_144: 0.105, 524_288: 0.083}
"""Share of c4 blocks on the GPU, by context, as aimed at; beyond the last, the last."""
WHAT = "Concurrency and tokens a second of one GPU, by context and by what is kept on it"
NOTES = (
    "Random weights: every sequence reads one made-up document, whose records they share in the arena; the "
    "blocks on the GPU are each sequence's own. Plans follow a trace of the given overlap and footprint, "
    "after the memory indexer's scoring was done; `guarded` audits and never escalates (min_recall 0); "
    "`demand` is `exact` with the newest blocks for a plan. What `exact` and `demand` pull is chosen by "
    "random weights. Collectives between GPUs are left out. `host_concurrency` is how many of these "
    "sequences 80 % of this host's memory (or of 2 TB) would hold if they shared no document. "
    "`itl_p99_vs_frozen`: against the same batch while the index process is stopped, so that no set changes."
)


def main(arguments: Seq[str] | None = None) -> int:
    """Measure and write; 1 when a case failed."""
    options = _parser().parse_args(arguments)
    config = model_config(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.weights or Path(scratch)
        if not (path / INDEX_FILE).exists():
            write_model(path, config)
        model = ModelSettings(path=path, device=options.device)
        folder = ModelFolder.read(model)
        result = _head(options, folder, arguments)
        earlier = options.out / "throughput.json"
        if options.add and earlier.exists():
            added_to = json.loads(earlier.read_text(encoding="utf-8"))
            result["rows"] = added_to["rows"]
            result["command"] = f"{added_to['command']} && {result['command']}"
        asyncio.run(_measure_all(model, folder, options, result))
    return int(any(row["tokens_per_s"] is None for row in result["rows"]))


async def _measure_all(
    model: ModelSettings, folder: ModelFolder, options: argparse.Namespace, result: dict[str, Any]
) -> None:
    """Add the rows to the result, and write it again with each."""
    for cases in _systems(options, folder):
        async for row in _rows(model, folder, cases, options):
            result["rows"].append(row)
            print(row["context_tokens"], row["arm"], row["concurrency"], row["tokens_per_s"], flush=True)
            write(options.out, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest.throughput", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for throughput.json, .md and .png")
    parser.add_argument("--model", default="flash", choices=["flash", "tiny"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--contexts", nargs="+", type=int, default=[65_536, 262_144, 524_288, 1_048_576])
    parser.add_argument("--arms", nargs="+", type=Arm, default=list(Arm), choices=list(Arm))
    parser.add_argument("--kv-bytes", type=int, default=16 << 30)
    parser.add_argument("--footprint", type=float, help="share of c4 blocks; none: by context")
    parser.add_argument("--overlap", type=float, default=0.85, help="of an interval's blocks with the next's")
    parser.add_argument("--interval-steps", type=int, default=64)
    parser.add_argument("--recent-tokens", type=int, default=2048)
    parser.add_argument("--slack-blocks", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=8192, help="most tokens of a sequence")
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--warm-tokens", type=int, default=64, help="of each before the window begins")
    parser.add_argument("--window-s", type=float, default=8.0)
    parser.add_argument("--window-tokens", type=int, default=64, help="of each, at least, in a window")
    parser.add_argument("--start-s", type=float, default=120.0, help="until all sequences decode")
    parser.add_argument(
        "--weights", type=Path, help="where the weights are kept, 26 GB for `flash`; none: for this run only"
    )
    parser.add_argument("--add", action="store_true", help="keep the rows that --out has: of this machine")
    return parser


def _systems(options: argparse.Namespace, folder: ModelFolder) -> Iterator[list[Case]]:
    """By context, the arms that hold as much: they share a system and alternate on it."""
    plan = Plan(
        kv_bytes=options.kv_bytes,
        answer_tokens=options.answer_tokens,
        recent_tokens=options.recent_tokens,
        slack_blocks=options.slack_blocks,
        overlap=options.overlap,
        interval_steps=options.interval_steps,
        topk=folder.spec.index_topk,
    )
    for context in options.contexts:
        known = [share for tokens, share in FOOTPRINTS.items() if tokens >= context]
        footprint = options.footprint or (known or [FOOTPRINTS[max(FOOTPRINTS)]])[0]
        alike: dict[tuple[int, int, bool], list[Case]] = {}
        for arm in options.arms:
            case = Case(arm, context, footprint, plan, folder.geometry)
            alike.setdefault((case.rows, case.keys, case.keeps_keys), []).append(case)
        yield from alike.values()


async def _rows(
    model: ModelSettings, folder: ModelFolder, cases: Seq[Case], options: argparse.Namespace
) -> AsyncIterator[Row]:
    """Cases whose GPU memory is divided alike, with one system: each at batch 1, then with all that fit."""
    most = min(cases[0].concurrency(), options.max_sequences)

    def row(case: Case, sequences: int, found: Window | str, *, batch1: bool) -> Row:
        return row_of(
            case,
            found,
            sequences=sequences,
            batch1=batch1,
            index_placement="cpu" if _device(options) == "cpu" else "gpu",
            experts_stored=folder.spec.num_experts,
            host_bytes=_host_bytes(),
        )

    wanted = [(case, sequences, batch1) for sequences, batch1 in ((1, True), (most, False)) for case in cases]
    if most == 0:
        for case in cases:
            failure = f"no sequence fits in {case.plan.kv_bytes} bytes"
            yield row(case, 0, failure, batch1=False)
        return
    try:
        async with running_system(model, folder, cases[0], sequences=most, device=options.device) as system:
            while wanted:
                case, sequences, batch1 = wanted.pop(0)
                try:
                    found: Window | str = await measure(
                        system,
                        case,
                        sequences=sequences,
                        length=Length(
                            options.warm_tokens, options.window_tokens, options.window_s, options.start_s
                        ),
                    )
                except (ForepageError, WindowError, OSError, grpc.aio.AioRpcError) as error:
                    found = f"{type(error).__name__}: {error}"
                yield row(case, sequences, found, batch1=batch1)
    except (ForepageError, StartError) as error:
        for case, sequences, batch1 in wanted:
            yield row(case, sequences, f"{type(error).__name__}: {error}", batch1=batch1)


def _head(options: argparse.Namespace, folder: ModelFolder, arguments: Seq[str] | None) -> dict[str, Any]:
    """The whole file, without rows yet."""
    is_gpu = _device(options) != "cpu"
    ceilings = link_ceilings() if is_gpu else None
    commit = commit_of_tree()
    why = {} if ceilings else {"ceilings": "no GPU: nothing crosses a link"}
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "what": WHAT,
        "command": shlex.join(["python", "-m", "loadtest.throughput", *given]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {
            "gpu": torch.cuda.get_device_name() if is_gpu else None,
            "host_bytes": _host_bytes(),
            "torch": torch.__version__,
        },
        "ceilings": ceilings,
        "config": {
            "notes": NOTES,
            "model": folder.name,
            "layers": folder.spec.num_layers,
            "footprints": options.footprint or {str(key): value for key, value in FOOTPRINTS.items()},
            **{
                name: getattr(options, name)
                for name in ("overlap", "interval_steps", "recent_tokens", "slack_blocks", "answer_tokens")
            },
            "window_s": options.window_s,
            "window_tokens": options.window_tokens,
        },
        "why": why if commit else why | {"commit": "not run in a git work tree"},
        "rows": [],
    }


def _device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return str(options.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    raise SystemExit(main())
