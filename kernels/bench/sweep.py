"""Variants of one kernel at V4-Flash's sizes: each checked against the reference, then timed.

    cd kernels && python -m bench.sweep                    all kernels, under two minutes
    cd kernels && python -m bench.sweep --only sparse_decode

A variant that fails or is wrong is named with its error and not timed; the others go on. Shares are of what
the device moves or computes, measured in the same run. `head` is the library's product, as the model's head
calls it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench import flash
from bench.attention import BF16_TOLERANCE, filled_pool
from bench.case import Call, Ceiling, WrongResultError, worst_error
from bench.ceilings import measure_ceilings
from bench.scoring import random_keys
from bench.timing import time_us
from forepage_kernels.layout import RowPool
from forepage_kernels.memory_indexer import kernel as memory_indexer
from forepage_kernels.memory_indexer.reference import memory_indexer as memory_indexer_reference
from forepage_kernels.mix_streams import MixParameters, collapse_streams, project_streams
from forepage_kernels.mix_streams import reference as mix_streams_reference
from forepage_kernels.sparse_decode import kernel as sparse_decode
from forepage_kernels.sparse_decode.reference import sparse_decode as sparse_decode_reference

DECODE_BATCHES = (1, 16, 64, 85, 128, 256)
LONG_ROWS, LONG_BATCHES = 8_192, (1, 4, 27)
"""What a c128 layer attends at 1M tokens."""
POOL_BLOCKS = 4_096
HISTORY_ENTRIES, SHORT_ENTRIES = 262_144, 24_576
INDEXED = ((1, SHORT_ENTRIES), (1, HISTORY_ENTRIES), (4, HISTORY_ENTRIES))
CHECKED_BLOCKS = 128
VOCABULARY, HIDDEN = 129_280, 4_096
HEAD_BATCHES = (1, 16, 64, 128, 256)
STREAM_BATCHES = (1, 64, 256)
CHECKED_OUTPUTS = 4_096
SCORE_TOLERANCE = 2e-5
"""As the tests have it for fp32: only the order of sums differs."""
HEAD_TOLERANCE = 3e-5
"""4,096 columns in steps of 16, each rounding at 2^-23: what `fp32_linear` promises."""
CHECKED_BATCH = 4
SEED = 0


@dataclass(frozen=True)
class Variant:
    """One way to run one shape: `call` gives the result that `check` compares; bytes and flops as in Case."""

    kernel: str
    shape: str
    name: str
    call: Call
    check: Callable[[], float]
    num_bytes: int
    flops: int


def main(only: Annotated[list[str] | None, typer.Option(help="kernels; none: all")] = None) -> None:
    """Check and time every variant; one row each."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    device = torch.device("cuda", 0)
    torch.manual_seed(SEED)
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        memory, bf16 = ceilings[Ceiling.MEMORY], ceilings[Ceiling.BF16]
        typer.echo(
            f"{torch.cuda.get_device_name(0)}: {memory / 1e9:,.0f} GB/s, {bf16 / 1e12:,.0f} TFLOP/s bf16\n"
        )
        typer.echo(
            "| kernel | shape | variant | us | limit us | share | error |\n|---|---|---|---|---|---|---|"
        )
        for variant in variants(device):
            if only and variant.kernel not in only:
                continue
            limit_us = 1e6 * max(variant.num_bytes / memory, variant.flops / bf16)
            typer.echo(
                f"| {variant.kernel} | {variant.shape} | {variant.name} | {_measured(variant, limit_us)} |"
            )


def _measured(variant: Variant, limit_us: float) -> str:
    """Time, limit, share and error, or what went wrong."""
    try:
        error = variant.check()
        torch.cuda.synchronize()
    except (WrongResultError, RuntimeError) as failure:
        return f"{type(failure).__name__}: {str(failure).splitlines()[0]} | | |"
    us = time_us([variant.call])
    return f"{us:,.1f} | {limit_us:,.1f} | {100 * limit_us / us:.0f}% | {error:.1e}"


def variants(device: torch.device) -> Iterator[Variant]:
    """All of them, kernel by kernel, shape by shape."""
    pool = filled_pool(flash.ROWS, POOL_BLOCKS, device)
    for batch in DECODE_BATCHES:
        yield from _decode_variants(pool, batch, flash.TOPK, device)
    for batch in LONG_BATCHES:
        yield from _decode_variants(pool, batch, LONG_ROWS, device)
    for batch, entries in INDEXED:
        yield from _memory_variants(batch, entries, device)
    weight = torch.randn(VOCABULARY, HIDDEN, device=device).bfloat16()
    wide = weight.float()
    for batch in HEAD_BATCHES:
        yield from _head_variants(batch, weight, wide)
    for batch in STREAM_BATCHES:
        yield from _stream_variants(batch, device)


STREAMS: Sequence[tuple[str, memory_indexer.Stream | None]] = (
    ("tile by tile", None),
    ("64 entries", memory_indexer.Stream(programs=396)),
    ("64 entries, 2 stages", memory_indexer.Stream(stages=2, programs=396, registers=168)),
    ("64 entries, 3 stages, 2 an SM", memory_indexer.Stream(stages=3, programs=264)),
    ("64 entries, 2 waves", memory_indexer.Stream()),
    ("128 entries, 8 warps", memory_indexer.Stream(entries=128, warps=8, programs=132)),
    ("128 entries, 8 warps, 2 stages", memory_indexer.Stream(entries=128, warps=8, stages=2, programs=132)),
)


def _memory_variants(batch: int, entries: int, device: torch.device) -> Iterator[Variant]:
    blocks, layers, heads = entries // flash.BLOCK_ENTRIES, flash.MEMORY_LAYERS, flash.MEMORY_HEADS
    keys = random_keys(batch * blocks, layers, device).flatten()
    planes = torch.arange(batch * blocks * layers, device=device).view(batch, blocks, layers)
    planes = planes * flash.KEYS.plane_bytes
    queries = torch.randn(batch, layers, heads, flash.INDEX_DIMS, device=device, dtype=torch.bfloat16)
    weights = torch.randn(batch, layers, heads, device=device) * (flash.INDEX_DIMS * heads) ** -0.5
    wanted = memory_indexer_reference(
        queries.float(),
        weights,
        keys,
        layout=flash.KEYS,
        plane_offsets=planes[:, :CHECKED_BLOCKS].contiguous(),
        threshold=0.0,
    )

    def score(stream: memory_indexer.Stream | None) -> Tensor:
        return memory_indexer.memory_indexer(
            queries, weights, keys, layout=flash.KEYS, plane_offsets=planes, threshold=0.0, stream=stream
        )

    def check(stream: memory_indexer.Stream | None) -> float:
        got = score(stream)
        if not torch.equal(got, score(stream)):
            raise WrongResultError("memory_indexer: the same call gave other bits")
        return worst_error("memory_indexer", got[:, : wanted.shape[1]], wanted, tolerance=SCORE_TOLERANCE)

    num_scored = batch * entries * layers
    for name, stream in STREAMS:
        yield Variant(
            kernel="memory_indexer",
            shape=f"{batch} x {entries} entries x {layers} layers",
            name=name,
            call=partial(score, stream),
            check=partial(check, stream),
            num_bytes=num_scored * (flash.KEYS.value_bytes + flash.KEYS.scale_bytes),
            flops=2 * num_scored * heads * flash.INDEX_DIMS,
        )


def _head_variants(batch: int, weight: Tensor, wide: Tensor) -> Iterator[Variant]:
    """Logits of bf16 activations: in fp32, or bf16 products with fp32 sums (`model/fp32_linear.py`)."""
    x = torch.randn(batch, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
    wanted = x.double() @ weight[:CHECKED_OUTPUTS].double().T
    calls: dict[str, Callable[[], Tensor]] = {
        "fp32": lambda: torch.nn.functional.linear(x.float(), wide),
        "bf16, sums in fp32": lambda: torch.mm(x, weight.T, out_dtype=torch.float32),
    }

    def check(call: Callable[[], Tensor]) -> float:
        return worst_error("head", call()[:, :CHECKED_OUTPUTS], wanted, tolerance=HEAD_TOLERANCE)

    for name, call in calls.items():
        yield Variant(
            kernel="head",
            shape=f"batch {batch}, {weight.shape[1]} -> {weight.shape[0]}",
            name=name,
            call=call,
            check=partial(check, call),
            num_bytes=weight.nbytes + x.nbytes + 4 * batch * weight.shape[0],
            flops=2 * batch * weight.numel(),
        )


def _stream_variants(batch: int, device: torch.device) -> Iterator[Variant]:
    """A hyper-connection's way in: streams times its matrix, then what `collapse_streams` makes of that."""
    num_streams = 4
    width = (2 + num_streams) * num_streams
    streams = torch.randn(batch, num_streams, HIDDEN, device=device).bfloat16()
    fn = torch.randn(width, num_streams * HIDDEN, device=device) * (num_streams * HIDDEN) ** -0.5
    norm_weight = torch.rand(HIDDEN, device=device) + 0.5
    how = MixParameters(torch.randn(width, device=device), torch.ones(3, device=device), 1e-6, 1e-6, 20)
    projections: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fp32": mix_streams_reference.project_streams,
        "bf16 parts": project_streams,
    }
    wanted = (streams.flatten(1).double() @ fn.double().T).unsqueeze(0)

    def check(project: Callable[[Tensor, Tensor], Tensor]) -> float:
        got = project(streams, fn).double().sum(0, keepdim=True)
        return worst_error("mix_streams", got, wanted, tolerance=HEAD_TOLERANCE)

    def collapse(project: Callable[[Tensor, Tensor], Tensor]) -> object:
        return collapse_streams(streams, project(streams, fn), norm_weight, how)

    for name, project in projections.items():
        yield Variant(
            kernel="mix_streams",
            shape=f"{batch} x {num_streams} x {HIDDEN}, projected and collapsed",
            name=name,
            call=partial(collapse, project),
            check=partial(check, project),
            num_bytes=streams.nbytes + fn.nbytes + 2 * batch * HIDDEN,
            flops=2 * batch * fn.numel(),
        )


DECODE_TILES: Sequence[tuple[str, sparse_decode.Tile]] = (
    ("one after another, parts of 320", sparse_decode.Tile(64, 64, 320)),
    ("one after another, parts of 640", sparse_decode.Tile(64, 64, 640)),
    ("overlapped, parts of 320", sparse_decode.Tile(64, 64, 320, overlapped=True)),
    ("overlapped, parts of 640", sparse_decode.Tile(64, 64, 640, overlapped=True)),
    ("overlapped, parts of 1280", sparse_decode.Tile(64, 64, 1280, overlapped=True)),
)


def _decode_variants(pool: RowPool, batch: int, num_rows: int, device: torch.device) -> Iterator[Variant]:
    window = filled_pool(flash.WINDOW_ROWS, batch, device)
    q = torch.randn(batch, flash.HEADS, flash.HEAD_DIM, device=device, dtype=torch.bfloat16)
    rows = torch.stack([torch.randperm(pool.num_slots, device=device)[:num_rows] for _ in range(batch)])
    ring = torch.arange(batch * flash.WINDOW, device=device).view(batch, flash.WINDOW)
    sinks = torch.randn(flash.HEADS, device=device)
    scale = flash.HEAD_DIM**-0.5
    few = min(batch, CHECKED_BATCH)
    wanted = sparse_decode_reference(
        q[:few].float(), pool, rows[:few], window, ring[:few], sinks, softmax_scale=scale
    )
    attended = batch * (num_rows + flash.WINDOW)

    def attend(tile: sparse_decode.Tile) -> Tensor:
        return sparse_decode.sparse_decode(q, pool, rows, window, ring, sinks, softmax_scale=scale, tile=tile)

    def check(tile: sparse_decode.Tile) -> float:
        got = attend(tile)
        if not torch.equal(got, attend(tile)):
            raise WrongResultError("sparse_decode: the same call gave other bits")
        return worst_error("sparse_decode", got[:few], wanted, tolerance=BF16_TOLERANCE)

    for name, tile in DECODE_TILES:
        yield Variant(
            kernel="sparse_decode",
            shape=f"batch {batch}, {num_rows} + {flash.WINDOW} rows",
            name=name,
            call=partial(attend, tile),
            check=partial(check, tile),
            num_bytes=attended * flash.ROW_BYTES + 2 * q.numel() * q.element_size(),
            flops=4 * attended * flash.HEADS * flash.HEAD_DIM,
        )


if __name__ == "__main__":
    typer.run(main)
