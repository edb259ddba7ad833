"""What every kind of run shares: its options, the model it serves, and the file that its rows go into."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forepage.settings import ModelSettings, WorkerSettings
from forepage.worker.assembly import ModelFolder
from loadtest.result_file import result_file
from loadtest.throughput.case import Arm, Case, Plan
from loadtest.throughput.ceilings import link_ceilings
from loadtest.throughput.measure import Length
from loadtest.throughput.model import INDEX_FILE, model_config, write_model
from loadtest.throughput.progress import say
from loadtest.throughput.report import write
from loadtest.throughput.rows import Row

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


@dataclass
class Run:
    """One run of the command; `result` is what is written with every row."""

    options: argparse.Namespace
    model: ModelSettings
    folder: ModelFolder
    result: dict[str, Any]

    @property
    def device(self) -> str:
        """Where the worker computes."""
        return _device(self.options)

    @property
    def index_placement(self) -> str:
        """Where the index scores."""
        return "cpu" if self.device == "cpu" else "gpu"

    @property
    def length(self) -> Length:
        """Of every window."""
        given = self.options
        return Length(
            given.warm_tokens, given.window_tokens, given.window_s, given.start_s, given.early_tokens
        )

    def case(self, arm: Arm, context: int) -> Case:
        """One arm at one context."""
        given = self.options
        plan = Plan(
            kv_bytes=given.kv_bytes,
            answer_tokens=given.answer_tokens,
            recent_tokens=given.recent_tokens,
            slack_blocks=given.slack_blocks,
            overlap=given.overlap,
            interval_steps=given.interval_steps,
            topk=self.folder.spec.index_topk,
        )
        known = [share for tokens, share in FOOTPRINTS.items() if tokens >= context]
        footprint = given.footprint or (known or [FOOTPRINTS[max(FOOTPRINTS)]])[0]
        return Case(arm, context, footprint, plan, self.folder.geometry)

    def add(self, row: Row) -> None:
        """One more row; the file is written again."""
        self.result["rows"].append(row)
        write(self.options.out, self.result)

    @property
    def exit_code(self) -> int:
        """1 when a case failed."""
        return int(any(row["tokens_per_s"] is None for row in self.result["rows"]))


@contextmanager
def open_run(parser: argparse.ArgumentParser, arguments: Seq[str] | None) -> Iterator[Run]:
    """Read the options, write the model unless it is there."""
    options = parser.parse_args(arguments)
    config = model_config(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.weights or Path(scratch)
        if not (path / INDEX_FILE).exists():
            write_model(path, config)
            say("weights written")
        model = ModelSettings(path=path, device=options.device)
        folder = ModelFolder.read(model)
        given = sys.argv[1:] if arguments is None else arguments
        result = _head(options, folder, shlex.join(["python", "-m", parser.prog, *given]))
        earlier = options.out / "throughput.json"
        if options.add and earlier.exists():
            added_to = json.loads(earlier.read_text(encoding="utf-8"))
            result["rows"] = added_to["rows"]
            result["command"] = f"{added_to['command']} && {result['command']}"
        yield Run(options, model, folder, result)


def shared_options(
    prog: str, description: str | None, *, contexts: Seq[int], arms: Seq[Arm], choices: Seq[Arm] = tuple(Arm)
) -> argparse.ArgumentParser:
    """The options that every kind of run has; by default it measures these `arms` at these `contexts`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=list(contexts), help="of those that decode"
    )
    parser.add_argument("--arms", nargs="+", type=Arm, default=list(arms), choices=list(choices))
    parser.add_argument("--out", type=Path, required=True, help="folder for throughput.json, .md and .png")
    parser.add_argument("--model", default="flash", choices=["flash", "tiny"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--kv-bytes", type=int, default=16 << 30)
    parser.add_argument("--footprint", type=float, help="share of c4 blocks; none: by context")
    parser.add_argument("--overlap", type=float, default=0.85, help="of an interval's blocks with the next's")
    parser.add_argument("--interval-steps", type=int, default=64)
    parser.add_argument("--recent-tokens", type=int, default=2048)
    parser.add_argument("--slack-blocks", type=int, default=WorkerSettings().load_slack_blocks)
    parser.add_argument("--answer-tokens", type=int, default=8192, help="most tokens of a sequence")
    parser.add_argument("--warm-tokens", type=int, default=64, help="of each before the window begins")
    parser.add_argument(
        "--early-tokens", type=int, default=256, help="of a guarded sequence before its steady window begins"
    )
    parser.add_argument("--window-s", type=float, default=8.0)
    parser.add_argument("--window-tokens", type=int, default=64, help="of each, at least, in a window")
    parser.add_argument("--start-s", type=float, default=120.0, help="until all sequences decode")
    parser.add_argument(
        "--weights", type=Path, help="where the weights are kept, 26 GB for `flash`; none: for this run only"
    )
    parser.add_argument(
        "--note", action="append", default=[], help="what else there is to know, as what ran beside it"
    )
    parser.add_argument("--add", action="store_true", help="keep the rows that --out has: of this machine")
    return parser


def host_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _head(options: argparse.Namespace, folder: ModelFolder, command: str) -> dict[str, Any]:
    """The whole file, without rows yet."""
    is_gpu = _device(options) != "cpu"
    if is_gpu:
        torch.cuda.set_device(torch.device(_device(options)).index or 0)
    ceilings = link_ceilings() if is_gpu else None
    return result_file(
        WHAT,
        command=command,
        device={
            "gpu": torch.cuda.get_device_name() if is_gpu else None,
            "host_bytes": host_bytes(),
            "torch": torch.__version__,
        },
        ceilings=ceilings,
        config={
            "notes": " ".join((NOTES, *options.note)),
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
        why={} if ceilings else {"ceilings": "no GPU: nothing crosses a link"},
    )


def _device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return str(options.device)
    return "cuda" if torch.cuda.is_available() else "cpu"
