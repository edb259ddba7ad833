"""A call of every kernel's launcher on small CPU tensors with V4-Flash's dims; their values do not matter."""

import torch
from torch import Tensor

import forepage_kernels.compress_quantize.kernel as compress_quantize
import forepage_kernels.compress_token.kernel as compress_token
import forepage_kernels.draw_sorted.kernel as draw_sorted
import forepage_kernels.fp8_linear.kernel as fp8_linear
import forepage_kernels.gather_blocks.kernel as gather_blocks
import forepage_kernels.gather_rows.kernel as gather_rows
import forepage_kernels.memory_indexer.kernel as memory_indexer
import forepage_kernels.mix_streams.kernel as mix_streams
import forepage_kernels.mix_streams.projection as mix_projection
import forepage_kernels.moe.kernel as moe
import forepage_kernels.moe.sorting as moe_sorting
import forepage_kernels.native_indexer.kernel as native_indexer
import forepage_kernels.prefill_attention.kernel as prefill_attention
import forepage_kernels.prefill_indexer.kernel as prefill_indexer
import forepage_kernels.resolve_rows.kernel as resolve_rows
import forepage_kernels.row_norm.kernel as row_norm
import forepage_kernels.row_turn.kernel as row_turn
import forepage_kernels.select_topk.kernel as select_topk
import forepage_kernels.sparse_decode.kernel as sparse_decode
import forepage_kernels.unpack_rows.kernel as unpack_rows
from forepage.training.backbone import sinkhorn_kernel
from forepage_kernels.compress_token import Window
from forepage_kernels.fp8_linear import Fp8Weight
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool
from forepage_kernels.mix_streams import MixParameters
from forepage_kernels.moe import Fp4Experts

F32, BF16 = torch.float32, torch.bfloat16
FLASH = RowLayout(64, 448, 64, "fp8")
SEEDED = RowLayout(64, 64, 64, "fp8")
KEY = KeyLayout(64, 128, "fp8")
MXFP4_KEY = KeyLayout(64, 128, "mxfp4")


def i64(*sizes: int) -> Tensor:
    """Ids; their values do not matter to a compiler."""
    return torch.zeros(sizes, dtype=torch.int64)


def row_pool(layout: RowLayout) -> RowPool:
    """Two layers of two blocks, the second layer's view."""
    block = -(-layout.plane_bytes // layout.value_bytes) * layout.value_bytes
    return RowPool(torch.zeros(2, 2 * block, dtype=torch.uint8), block, layout)


def key_pool(layout: KeyLayout) -> KeyPool:
    """Two layers of two blocks, the second layer's view."""
    return KeyPool(torch.zeros(2, 2 * layout.plane_bytes, dtype=torch.uint8), layout.plane_bytes, layout)


def run_gather_blocks(block_bytes: int) -> None:
    pool, arena = torch.zeros(2, block_bytes, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    gather_blocks.gather_blocks(pool, arena, block_ids=i64(2), arena_offsets=i64(2))


def run_gather_rows(layout: RowLayout) -> None:
    arena = torch.zeros(1 << 20, dtype=torch.uint8)
    gather_rows.gather_rows(row_pool(layout), arena, slots=i64(5), plane_offsets=i64(5), entries=i64(5))


def run_memory_indexer(heads: int, layers: int, dtype: torch.dtype, layout: KeyLayout = KEY) -> None:
    queries, weights = torch.zeros(2, layers, heads, 128, dtype=dtype), torch.zeros(2, layers, heads)
    keys = torch.zeros(1 << 16, dtype=torch.uint8)
    memory_indexer.memory_indexer(
        queries, weights, keys, layout=layout, plane_offsets=i64(2, 5, layers), threshold=0.5
    )


def run_native_indexer(heads: int, layout: KeyLayout) -> None:
    pool = key_pool(layout)
    native_indexer.native_indexer(
        torch.zeros(2, heads, layout.dims),
        torch.zeros(2, heads),
        pool,
        block_table=torch.zeros(2, 5, dtype=torch.int32),
        visible=i64(2),
    )


def run_sinkhorn(*, backward: bool) -> None:
    matrices = torch.zeros(200, 4, 4)
    if backward:
        sinkhorn_kernel.backward(matrices, matrices, 20, 1e-6)
    else:
        sinkhorn_kernel.forward(matrices, 20, 1e-6)


def run_select_topk(entries: int, k: int) -> None:
    select_topk.select_topk(torch.zeros(1, entries), k)


def run_sparse_decode(
    layout: RowLayout,
    heads: int,
    selected: int,
    dtype: torch.dtype,
    tile: sparse_decode.Tile | None = None,
) -> None:
    pool = row_pool(layout) if selected else None
    window = row_pool(RowLayout(128, layout.nope_dims, layout.rope_dims, "fp8"))
    q = torch.zeros(2, heads, layout.head_dim, dtype=dtype)
    sparse_decode.sparse_decode(
        q,
        pool,
        i64(2, selected),
        window,
        i64(2, 128),
        torch.zeros(heads),
        softmax_scale=0.1,
        tile=tile,
    )


def run_compress_quantize(pool: RowPool | KeyPool, tokens: int) -> None:
    dims = pool.layout.dims
    kv = torch.zeros(3, tokens, dims)
    angle = torch.zeros(3, 32)
    compress_quantize.compress_quantize(
        kv, kv, torch.ones(dims), angle, angle, pool, i64(3), rope_dims=64, eps=1e-6
    )


def run_moe(step: str, tile: moe.Tile, size: int = 2048, width: int = 4096) -> None:
    """One expert; the pairs' values do not matter to a compiler."""
    experts = Fp4Experts(
        torch.zeros(1, 2 * size, width // 2, dtype=torch.uint8),
        torch.zeros(1, 2 * size, width // 32, dtype=torch.uint8),
        torch.zeros(1, width, size // 2, dtype=torch.uint8),
        torch.zeros(1, width, size // 32, dtype=torch.uint8),
        first=0,
        total=1,
    )
    x, hidden = torch.zeros(2, width, dtype=BF16), torch.zeros(12, size, dtype=BF16)
    pairs = moe_sorting.SortedPairs(torch.zeros(12, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32))
    if step == "sort":
        moe_sorting.sort_pairs(i64(2, 6), first=0, num_experts=256, tile_tokens=16)
    elif step == "gate_up":
        moe.launch_gate_up(x, experts, pairs, hidden, tile, 6, 10.0)
    elif step == "down":
        moe.launch_down(hidden, experts, pairs, torch.zeros(12, width, dtype=BF16), tile)
    else:
        outputs, out = torch.zeros(12, width, dtype=BF16), torch.zeros(2, width)
        moe.launch_combine(outputs, i64(2, 6), torch.zeros(2, 6), experts, out)


def run_fp8_linear(tokens: int, outputs: int, inputs: int, *, quantise: bool = False) -> None:
    weight = Fp8Weight(
        torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn),
        torch.zeros(-(-outputs // 128), -(-inputs // 128), dtype=torch.float8_e8m0fnu),
        part_rows=outputs,
    )
    fp8_linear.fp8_linear(torch.zeros(tokens, 1, inputs, dtype=BF16), weight, quantise=quantise)


def run_unpack_rows(pool: RowPool | KeyPool, dtype: torch.dtype) -> None:
    unpack_rows.unpack_rows(pool, i64(5), dtype)


def run_prefill_indexer(heads: int, dims: int) -> None:
    keys = torch.zeros(9, dims, dtype=torch.bfloat16)
    prefill_indexer.prefill_indexer(
        torch.zeros(5, heads, dims), torch.zeros(5, heads), keys, start=32, ratio=4
    )


def run_prefill_attention(heads: int, dims: int, selected: int | None, dtype: torch.dtype) -> None:
    prefill_attention.prefill_attention(
        torch.zeros(5, heads, dims, dtype=dtype),
        torch.zeros(9, dims, dtype=dtype),
        None if selected is None else i64(5, selected),
        torch.zeros(132, dims, dtype=dtype),
        torch.zeros(heads),
        start=640,
        ratio=4 if selected else 128,
        window_tokens=128,
        softmax_scale=0.1,
    )


def run_mix_streams(op: str, dims: int, dtype: torch.dtype) -> None:
    streams = torch.zeros(3, 4, dims, dtype=dtype)
    if op == "expand":
        mix_streams.expand_streams(
            streams[:, 0].contiguous(), streams, torch.zeros(3, 4), torch.zeros(3, 4, 4)
        )
    elif op == "project":
        mix_projection.project_streams(streams, torch.zeros(24, 4 * dims))
    else:
        how = MixParameters(torch.zeros(24), torch.zeros(3), 1e-6, 1e-6, 20)
        mix_streams.collapse_streams(streams, torch.zeros(32, 3, 24), torch.zeros(dims), how)


def run_compress_token(pool: RowPool | KeyPool, ratio: int) -> None:
    dims, halves = pool.layout.dims, 2 if ratio == 4 else 1
    how = Window(ratio, torch.zeros(ratio, halves * dims), torch.ones(dims), 64, 1e-6)
    state = torch.zeros(3, 2, halves * ratio, halves * dims)
    angle = torch.zeros(3, 32)
    compress_token.compress_token(
        torch.zeros(3, 2 * halves * dims),
        state,
        i64(3),
        i64(3),
        how,
        pool=pool,
        targets=i64(3),
        cos=angle,
        sin=angle,
    )


def run_resolve_rows(selected: int) -> None:
    resolve_rows.resolve_rows(
        i64(2, selected),
        torch.zeros(2, 5, dtype=torch.int32),
        staging=i64(2, 8),
        records=i64(2, 5),
        plane_offset=37_440,
        block_entries=64,
    )


def run_draw_sorted() -> None:
    one = torch.ones(2, dtype=torch.float64)
    probs = torch.ones(2, 129_280, dtype=torch.float64)
    draw_sorted.draw_sorted(probs, top_k=one, top_p=one, min_p=one, target=one)


def run_norm(dims: int) -> None:
    row_norm.rms_norm(torch.zeros(3, dims, dtype=torch.bfloat16), torch.ones(dims), 1e-6, torch.bfloat16)


def run_hadamard(dims: int) -> None:
    row_turn.hadamard(torch.zeros(3, dims))


def run_turn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    angle = torch.zeros(shape[0], 1, 32)
    row_turn.turn_pairs(torch.zeros(shape, dtype=dtype), angle, angle)
