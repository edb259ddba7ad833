"""`python -m loadtest.decode --out steps.json`: step times on this GPU by batch, context and launching.

Ways: `eager` launches kernel by kernel and reads each step at once; `graph` replays, and reads at once;
`ahead` replays a step before the last one is read, as the worker does. `device` is the time between two
replays that nobody reads; `host` what the host spends in launching one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from forepage.telemetry import open_telemetry
from forepage.worker.launched_step import DecodeRow
from forepage.worker.padded_decode import PaddedStep
from forepage.worker.sampler import Row, Sampling
from loadtest.decode.synthetic import SyntheticDecode, SyntheticModel, bundled_config, flash_config

GREEDY = Sampling(0.0, 1.0, 0, 0.0, 0)
DRAWING = Sampling(0.8, 0.95, 50, 0.0, 3)
STEPS, WARM_STEPS = 30, 6
MAX_KV_BYTES = 40 << 30
CONFIGS: dict[str, Callable[[], dict[str, object]]] = {
    "seeded": bundled_config,
    "flash-5": lambda: flash_config(num_layers=5, num_experts=32),
}


@dataclass(frozen=True)
class Case:
    """What is timed; with less than all rows resident, the rest is pulled as in `exact`."""

    model: SyntheticModel
    batch: int
    context_tokens: int
    how: Sampling = GREEDY
    resident_share: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Milliseconds a step, medians."""

    model: str
    batch: int
    context_tokens: int
    sampling: str
    resident_share: float
    eager_ms: float
    graph_ms: float
    ahead_ms: float
    device_ms: float
    host_ms: float
    eager_host_ms: float
    capture_s: float
    graph_bytes: int


def main(arguments: Seq[str] | None = None) -> int:
    """Measure and write; prints a line a case."""
    parser = argparse.ArgumentParser(prog="loadtest.decode", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 65_536])
    parser.add_argument("--profile", type=Path, help="write a profile of eager steps at the middle batch")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0)
    results: list[StepTime] = []
    with torch.inference_mode():
        for name in options.models:
            model = SyntheticModel.make(name, CONFIGS[name](), device)
            for measured in measure_model(model, options.batches, options.contexts):
                results.append(measured)
                print(json.dumps(asdict(measured)), flush=True)
            if options.profile is not None:
                write_profile(model, options.batches[len(options.batches) // 2], options.profile)
    options.out.write_text(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(device),
                "torch": torch.__version__,
                "steps": [asdict(one) for one in results],
            },
            indent=1,
        )
    )
    return 0


def measure_model(model: SyntheticModel, batches: Seq[int], contexts: Seq[int]) -> Iterable[StepTime]:
    """Every case that fits, greedy; at 4K also with drawn tokens."""
    for context in contexts:
        for batch in batches:
            kv_bytes = model.geometry.kv_bytes(
                num_tokens=context,
                row_blocks=model.geometry.num_blocks(context),
                key_blocks=model.geometry.num_blocks(context),
            )
            if batch * kv_bytes > MAX_KV_BYTES:
                continue
            yield measure(Case(model, batch, context))
            yield measure(Case(model, batch, context, resident_share=0.25))
            if context == contexts[0]:
                yield measure(Case(model, batch, context, how=DRAWING))


def measure(case: Case) -> StepTime:
    """One case, all ways."""
    model, how = case.model, case.how
    telemetry = open_telemetry("loadtest", instance_id="decode")
    more = 8 * (STEPS + WARM_STEPS)

    def decode(max_graphs: int) -> SyntheticDecode:
        return SyntheticDecode(
            model,
            batch=case.batch,
            context_tokens=case.context_tokens,
            more_tokens=more,
            max_graphs=max_graphs,
            telemetry=telemetry,
            resident_share=case.resident_share,
        )

    rig = decode(max_graphs=0)
    eager_ms, eager_host_ms = timed(rig, how, ahead=0)
    rig.close()
    del rig
    rig = decode(max_graphs=4)
    started_s = time.perf_counter()
    launch(rig, how, is_first=True).read()
    capture_s = time.perf_counter() - started_s
    graph_ms, _ = timed(rig, how, ahead=0)
    ahead_ms, host_ms = timed(rig, how, ahead=1)
    device_ms = timed_on_device(rig, how)
    rig.close()
    telemetry.close()
    return StepTime(
        model=model.name,
        batch=case.batch,
        context_tokens=case.context_tokens,
        sampling="drawn" if how is DRAWING else "greedy",
        resident_share=case.resident_share,
        eager_ms=round(eager_ms, 3),
        graph_ms=round(graph_ms, 3),
        ahead_ms=round(ahead_ms, 3),
        device_ms=round(device_ms, 3),
        host_ms=round(host_ms, 3),
        eager_host_ms=round(eager_host_ms, 3),
        capture_s=round(capture_s, 2),
        graph_bytes=rig.steps.graph_bytes,
    )


def launch(rig: SyntheticDecode, how: Sampling, *, is_first: bool = False) -> PaddedStep:
    """The next step of all sequences."""
    rows = [
        DecodeRow(slot, rig.position, 65 if is_first else None, Row(how, rig.position + 1), False, rig.pulls)
        for slot in range(rig.batch)
    ]
    rig.position += 1
    return rig.steps.launch(rows)


def timed(rig: SyntheticDecode, how: Sampling, *, ahead: int) -> tuple[float, float]:
    """Median milliseconds from one read to the next, and in the launch alone."""
    unread, read_at, launching = [], [], []
    for step in range(WARM_STEPS + STEPS):
        started_s = time.perf_counter()
        unread.append(launch(rig, how, is_first=step == 0))
        launching.append(time.perf_counter() - started_s)
        while len(unread) > ahead:
            unread.pop(0).read()
            read_at.append(time.perf_counter())
    for one in unread:
        one.read()
    gaps = [after - before for before, after in pairwise(read_at)]
    return statistics.median(gaps[WARM_STEPS:]) * 1e3, statistics.median(launching[WARM_STEPS:]) * 1e3


def timed_on_device(rig: SyntheticDecode, how: Sampling) -> float:
    """Milliseconds a step when steps are launched as fast as the device takes them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    launch(rig, how).read()
    start.record()
    for _ in range(STEPS):
        last = launch(rig, how)
    end.record()
    last.read()
    end.synchronize()
    return float(start.elapsed_time(end)) / STEPS


def write_profile(model: SyntheticModel, batch: int, path: Path) -> None:
    """What three eager steps launch, by time on the device."""
    telemetry = open_telemetry("loadtest", instance_id="decode")
    rig = SyntheticDecode(
        model, batch=batch, context_tokens=4096, more_tokens=64, max_graphs=0, telemetry=telemetry
    )
    launch(rig, GREEDY, is_first=True).read()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            launch(rig, GREEDY).read()
    events = profile.key_averages()
    kernels = sum(event.count for event in events if event.device_type.name == "CUDA")
    table = events.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
    with path.open("a") as file:
        file.write(f"{model.name}, batch {batch}: {kernels / 3:.0f} kernels and copies a step\n{table}\n\n")
    rig.close()
    telemetry.close()


if __name__ == "__main__":
    raise SystemExit(main())
