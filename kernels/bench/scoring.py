"""Cases that score keys and select: the memory indexer, the native indexer, top-k."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import flash
from bench.case import Case, Ceiling, WrongResultError, worst_error
from forepage_kernels.layout import KeyPool
from forepage_kernels.memory_indexer import memory_indexer
from forepage_kernels.memory_indexer.reference import memory_indexer as memory_indexer_reference
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.native_indexer.reference import native_indexer as native_indexer_reference
from forepage_kernels.select_topk import select_topk
from forepage_kernels.select_topk.reference import select_topk as select_topk_reference

HISTORY_ENTRIES = 262_144
CHECKED_ENTRIES = 8_192
"""The reference spells out every head's score: at the full size it would not fit."""
BF16_TOLERANCE = 2e-2


def scoring_cases(device: torch.device) -> Iterator[Case]:
    """Every case of the three kernels."""
    for batch in (1, 4):
        yield _memory_case(batch, device)
    for batch, entries in ((1, 24_576), (32, 24_576), (1, HISTORY_ENTRIES)):
        yield _native_case(batch, entries, device)
    for rows, entries in (
        (1, 24_576),
        (32, 24_576),
        (1, HISTORY_ENTRIES),
        (32, HISTORY_ENTRIES),
        (512, 131_072),
    ):
        yield _topk_case(rows, entries, device)


def random_keys(num_blocks: int, planes: int, device: torch.device) -> Tensor:
    """Random planes of fp8 keys u8 [num_blocks, planes * plane_bytes]: finite values, scales near 1."""
    layout = flash.KEYS
    values = torch.randn(num_blocks * planes, layout.entries * layout.dims, device=device)
    scales = torch.rand(num_blocks * planes, layout.entries, device=device).add(0.5).log2().round().exp2()
    parts = (values.to(torch.float8_e4m3fn).view(torch.uint8), scales.view(torch.uint8))
    return torch.cat(parts, dim=1).view(num_blocks, -1)


def _memory_case(batch: int, device: torch.device) -> Case:
    blocks = HISTORY_ENTRIES // flash.BLOCK_ENTRIES
    layers, heads, dims = flash.MEMORY_LAYERS, flash.MEMORY_HEADS, flash.INDEX_DIMS
    keys = random_keys(batch * blocks, layers, device).flatten()
    planes = torch.arange(batch * blocks * layers, device=device).view(batch, blocks, layers)
    planes = planes * flash.KEYS.plane_bytes
    queries = torch.randn(batch, layers, heads, dims, device=device, dtype=torch.bfloat16)
    weights = torch.randn(batch, layers, heads, device=device) * (dims * heads) ** -0.5
    score = partial(memory_indexer, queries, weights, keys, layout=flash.KEYS, threshold=0.5)
    checked = CHECKED_ENTRIES // flash.BLOCK_ENTRIES

    def check() -> float:
        some = planes[:, :checked].contiguous()
        wanted = memory_indexer_reference(
            queries.float(), weights, keys, layout=flash.KEYS, plane_offsets=some, threshold=0.0
        )
        got = memory_indexer(queries, weights, keys, layout=flash.KEYS, plane_offsets=some, threshold=0.0)
        return worst_error("memory_indexer", got, wanted, tolerance=BF16_TOLERANCE)

    num_scored = batch * HISTORY_ENTRIES * layers
    return Case(
        kernel="memory_indexer",
        shape=f"{batch} x {HISTORY_ENTRIES} entries x {layers} layers x {heads} heads x {dims}",
        dtype="fp8 keys, bf16 queries",
        num_bytes=num_scored * (flash.KEYS.value_bytes + flash.KEYS.scale_bytes),
        flops=2 * num_scored * heads * dims,
        ceilings=[Ceiling.MEMORY, Ceiling.FP8],
        calls=[lambda: score(plane_offsets=planes)],
        check=check,
    )


def _native_case(batch: int, entries: int, device: torch.device) -> Case:
    blocks = entries // flash.BLOCK_ENTRIES
    pool = KeyPool(random_keys(batch * blocks, 1, device), 0, flash.KEYS)
    table = torch.randperm(batch * blocks, device=device, dtype=torch.int32).view(batch, blocks)
    visible = torch.full((batch,), entries - 7, device=device)
    heads, dims = flash.INDEX_HEADS, flash.INDEX_DIMS
    q, weights = torch.randn(batch, heads, dims, device=device), torch.randn(batch, heads, device=device)

    def score() -> Tensor:
        return native_indexer(q, weights, pool, block_table=table, visible=visible)

    def check() -> float:
        few = min(batch, 2)
        got = native_indexer(q[:few], weights[:few], pool, block_table=table[:few], visible=visible[:few])
        wanted = native_indexer_reference(
            q[:few], weights[:few], pool, block_table=table[:few], visible=visible[:few]
        )
        if not torch.equal(got.isinf(), wanted.isinf()):
            raise WrongResultError("native_indexer: absent entries differ")
        return worst_error(
            "native_indexer", got.clamp(min=-1e6), wanted.clamp(min=-1e6), tolerance=BF16_TOLERANCE
        )

    return Case(
        kernel="native_indexer",
        shape=f"{batch} x {entries} entries x {heads} heads x {dims}",
        dtype="fp8 keys, f32 queries",
        num_bytes=batch * entries * (flash.KEYS.value_bytes + flash.KEYS.scale_bytes + 4),
        flops=2 * batch * entries * heads * dims,
        ceilings=[Ceiling.MEMORY, Ceiling.FP8],
        calls=[score],
        check=check,
    )


def _topk_case(rows: int, entries: int, device: torch.device) -> Case:
    logits = torch.randn(rows, entries, device=device)
    logits[:, ::97] = logits[:, :1]  # ties
    logits[:, 5::1001] = float("-inf")

    def check() -> float:
        got, wanted = select_topk(logits, flash.TOPK), select_topk_reference(logits, flash.TOPK)
        if not torch.equal(got, wanted):
            raise WrongResultError("select_topk: another selection than the reference's")
        return 0.0

    return Case(
        kernel="select_topk",
        shape=f"{flash.TOPK} of {entries}, {rows} rows",
        dtype="f32",
        num_bytes=rows * (4 * entries + 8 * flash.TOPK),
        flops=0,
        ceilings=[Ceiling.MEMORY],
        calls=[lambda: select_topk(logits, flash.TOPK)],
        check=check,
        torch_call=lambda: torch.topk(logits, flash.TOPK),
    )
