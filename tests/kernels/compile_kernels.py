"""Compiles every kernel for Hopper (sm_90) as its launcher would launch it; no GPU is used.

Run by test_compile_gate in its own process, because TRITON_INTERPRET must not be set here. Launchers
run on small CPU tensors with V4-Flash's dims, with the kernel replaced by a compiler that specialises
arguments as Triton does: an int of 1 becomes a constant, multiples of 16 are promised as such.
Prints one JSON object: variant -> bytes of shared memory a program takes.
"""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import forepage_kernels.compress_quantize.kernel as compress_quantize
import forepage_kernels.compress_token.kernel as compress_token
import forepage_kernels.draw_sorted.kernel as draw_sorted
import forepage_kernels.fp8_linear.kernel as fp8_linear
import forepage_kernels.gather_blocks.kernel as gather_blocks
import forepage_kernels.gather_rows.kernel as gather_rows
import forepage_kernels.memory_indexer.kernel as memory_indexer
import forepage_kernels.mix_streams.kernel as mix_streams
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

HOPPER = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages")
POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
}


class CompilerInsteadOfLaunch:
    """Stands where a kernel stands in its module; `shared_bytes` is what the last launch would take."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shared_bytes = -1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: object, **kwargs: Any) -> None:
        """Compile for these arguments as if the tensors lay on a GPU."""
        names = self.kernel.arg_names
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], object] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}
        values = dict(zip(names, args, strict=False)) | kwargs
        for index, name in enumerate(names):
            general = self.kernel.params[index].do_not_specialize
            kind, aligned = specialise(values[name], constexpr=name in kwargs, general=general)
            signature[name] = kind
            if kind == "constexpr":
                constants[(index,)] = values[name]
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        self.shared_bytes = triton.compile(source, target=HOPPER, options=options).metadata.shared


def specialise(value: object, *, constexpr: bool, general: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is a multiple of 16; `general`: do not look at it."""
    if constexpr or (isinstance(value, int) and value == 1 and not general):
        return "constexpr", False
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not general


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


FLASH = RowLayout(64, 448, 64, "fp8")
SEEDED = RowLayout(64, 64, 64, "fp8")
KEY = KeyLayout(64, 128, "fp8")
MXFP4_KEY = KeyLayout(64, 128, "mxfp4")


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


def run_sparse_decode(layout: RowLayout, heads: int, selected: int, dtype: torch.dtype) -> None:
    pool = row_pool(layout) if selected else None
    window = row_pool(RowLayout(128, layout.nope_dims, layout.rope_dims, "fp8"))
    q = torch.zeros(2, heads, layout.head_dim, dtype=dtype)
    sparse_decode.sparse_decode(
        q, pool, i64(2, selected), window, i64(2, 128), torch.zeros(heads), softmax_scale=0.1
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
    else:
        how = MixParameters(torch.zeros(24), torch.zeros(3), 1e-6, 1e-6, 20)
        mix_streams.collapse_streams(streams, torch.zeros(3, 24), torch.zeros(dims), how)


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


F32, BF16 = torch.float32, torch.bfloat16
Variant = tuple[ModuleType, str, Callable[[], None]]
"""A launcher's module, the kernels it launches, and a call of it."""
VARIANTS: dict[str, Variant] = {
    "gather_blocks": (gather_blocks, "copy_blocks", lambda: run_gather_blocks(987_008)),
    "gather_blocks-odd": (gather_blocks, "copy_blocks", lambda: run_gather_blocks(1008)),
    "gather_rows": (gather_rows, "copy_rows", lambda: run_gather_rows(FLASH)),
    "gather_rows-fp32": (gather_rows, "copy_rows", lambda: run_gather_rows(RowLayout(1, 64, 64, "fp32"))),
    "memory_indexer": (memory_indexer, "score_entries", lambda: run_memory_indexer(128, 3, F32)),
    "memory_indexer-bf16": (memory_indexer, "score_entries", lambda: run_memory_indexer(64, 3, BF16)),
    "memory_indexer-ones": (memory_indexer, "score_entries", lambda: run_memory_indexer(1, 1, F32)),
    "memory_indexer-mxfp4": (
        memory_indexer,
        "score_entries",
        lambda: run_memory_indexer(128, 3, F32, MXFP4_KEY),
    ),
    "memory_indexer-mxfp4-bf16": (
        memory_indexer,
        "score_entries",
        lambda: run_memory_indexer(64, 3, BF16, MXFP4_KEY),
    ),
    "mix_streams-collapse": (mix_streams, "collapse", lambda: run_mix_streams("collapse", 4096, BF16)),
    "mix_streams-collapse-pro": (mix_streams, "collapse", lambda: run_mix_streams("collapse", 7168, BF16)),
    "mix_streams-collapse-fp32": (mix_streams, "collapse", lambda: run_mix_streams("collapse", 128, F32)),
    "mix_streams-expand": (mix_streams, "expand", lambda: run_mix_streams("expand", 4096, BF16)),
    "native_indexer": (native_indexer, "score_resident", lambda: run_native_indexer(64, KEY)),
    "native_indexer-ones": (
        native_indexer,
        "score_resident",
        lambda: run_native_indexer(1, KeyLayout(64, 64, "fp8")),
    ),
    "native_indexer-mxfp4": (native_indexer, "score_resident", lambda: run_native_indexer(64, MXFP4_KEY)),
    "native_indexer-mxfp4-narrow": (
        native_indexer,
        "score_resident",
        lambda: run_native_indexer(1, KeyLayout(64, 32, "mxfp4")),
    ),
    "prefill_indexer": (prefill_indexer, "score_tile", lambda: run_prefill_indexer(64, 128)),
    "prefill_indexer-tiny": (prefill_indexer, "score_tile", lambda: run_prefill_indexer(8, 128)),
    "prefill_indexer-ones": (prefill_indexer, "score_tile", lambda: run_prefill_indexer(1, 32)),
    "prefill_attention": (prefill_attention, "attend", lambda: run_prefill_attention(64, 512, 512, BF16)),
    "prefill_attention-c128": (
        prefill_attention,
        "attend",
        lambda: run_prefill_attention(64, 512, None, BF16),
    ),
    "prefill_attention-tiny": (prefill_attention, "attend", lambda: run_prefill_attention(8, 128, 512, BF16)),
    "prefill_attention-tiny-c128": (
        prefill_attention,
        "attend",
        lambda: run_prefill_attention(8, 128, None, BF16),
    ),
    "prefill_attention-f32": (prefill_attention, "attend", lambda: run_prefill_attention(64, 512, 512, F32)),
    "prefill_attention-ones": (prefill_attention, "attend", lambda: run_prefill_attention(1, 96, None, F32)),
    "unpack_rows": (unpack_rows, "unpack_row_tile", lambda: run_unpack_rows(row_pool(FLASH), BF16)),
    "unpack_rows-f32": (unpack_rows, "unpack_row_tile", lambda: run_unpack_rows(row_pool(SEEDED), F32)),
    "unpack_rows-key": (unpack_rows, "unpack_key_tile", lambda: run_unpack_rows(key_pool(KEY), BF16)),
    "unpack_rows-mxfp4": (unpack_rows, "unpack_key_tile", lambda: run_unpack_rows(key_pool(MXFP4_KEY), BF16)),
    "select_topk": (select_topk, "find_maxima select_row", lambda: run_select_topk(262_144, 512)),
    "sinkhorn": (sinkhorn_kernel, "_forward", lambda: run_sinkhorn(backward=False)),
    "sinkhorn-backward": (sinkhorn_kernel, "_backward", lambda: run_sinkhorn(backward=True)),
    "select_topk-ones": (select_topk, "find_maxima select_row", lambda: run_select_topk(1, 1)),
    "sparse_decode": (sparse_decode, "attend join_parts", lambda: run_sparse_decode(FLASH, 64, 512, F32)),
    "sparse_decode-bf16": (
        sparse_decode,
        "attend join_parts",
        lambda: run_sparse_decode(FLASH, 128, 2048, BF16),
    ),
    "sparse_decode-window": (
        sparse_decode,
        "attend join_parts",
        lambda: run_sparse_decode(FLASH, 64, 0, BF16),
    ),
    "sparse_decode-ones": (sparse_decode, "attend join_parts", lambda: run_sparse_decode(SEEDED, 1, 1, BF16)),
    "compress_token-c4": (compress_token, "take_token", lambda: run_compress_token(row_pool(FLASH), 4)),
    "compress_token-c128": (
        compress_token,
        "take_token",
        lambda: run_compress_token(row_pool(RowLayout(2, 448, 64, "fp8")), 128),
    ),
    "compress_token-key": (compress_token, "take_token", lambda: run_compress_token(key_pool(KEY), 4)),
    "compress_token-mxfp4-key": (
        compress_token,
        "take_token",
        lambda: run_compress_token(key_pool(MXFP4_KEY), 4),
    ),
    "draw_sorted": (draw_sorted, "walk", run_draw_sorted),
    "resolve_rows": (resolve_rows, "resolve", lambda: run_resolve_rows(512)),
    "resolve_rows-one": (resolve_rows, "resolve", lambda: run_resolve_rows(1)),
    "row_norm": (row_norm, "norm", lambda: run_norm(4096)),
    "row_turn": (row_turn, "turn_row", lambda: run_turn((3, 64, 512), BF16)),
    "row_turn-fp32": (row_turn, "turn_row", lambda: run_turn((3, 64, 128), F32)),
    "row_turn-hadamard": (row_turn, "transform", lambda: run_hadamard(128)),
    "compress_quantize-c4": (
        compress_quantize,
        "close_entry",
        lambda: run_compress_quantize(row_pool(FLASH), 8),
    ),
    "compress_quantize-c128": (
        compress_quantize,
        "close_entry",
        lambda: run_compress_quantize(row_pool(FLASH), 128),
    ),
    "compress_quantize-window": (
        compress_quantize,
        "close_entry",
        lambda: run_compress_quantize(row_pool(FLASH), 1),
    ),
    "compress_quantize-key": (
        compress_quantize,
        "close_entry",
        lambda: run_compress_quantize(key_pool(KEY), 8),
    ),
    "compress_quantize-mxfp4-key": (
        compress_quantize,
        "close_entry",
        lambda: run_compress_quantize(key_pool(MXFP4_KEY), 8),
    ),
    "moe-sort": (moe_sorting, "place_pairs", lambda: run_moe("sort", moe.TILES[0])),
    "moe-combine": (moe, "combine", lambda: run_moe("combine", moe.TILES[0])),
    "moe-odd": (moe, "gate_up", lambda: run_moe("gate_up", moe.TILES[0], size=96, width=160)),
    **{
        f"moe-{step}-{tile.tokens}": (moe, step, lambda step=step, tile=tile: run_moe(step, tile))  # type: ignore[misc]
        for step in ("gate_up", "down")
        for tile in moe.TILES
    },
    **{
        f"fp8_linear-{tile.tokens}": (
            fp8_linear,
            "multiply_words add_sums",
            lambda tile=tile: run_fp8_linear(tile.tokens, 16_384, 1024),  # type: ignore[misc]
        )
        for tile in fp8_linear.TILES
    },
    "fp8_linear-odd": (fp8_linear, "multiply_words add_sums", lambda: run_fp8_linear(3, 16_385, 1026)),
    "fp8_linear-fp8": (
        fp8_linear,
        "quantise_rows multiply_fp8",
        lambda: run_fp8_linear(512, 16_384, 1024, quantise=True),
    ),
    "fp8_linear-sums": (fp8_linear, "multiply_words add_sums", lambda: run_fp8_linear(3, 1024, 4096)),
}


def main() -> None:
    """Compile all variants, print their shared memory."""
    shared_bytes = {}
    for name, (module, kernel_names, launch) in VARIANTS.items():
        compilers = {each: CompilerInsteadOfLaunch(getattr(module, each)) for each in kernel_names.split()}
        for each, compiler in compilers.items():
            setattr(module, each, compiler)
        launch()
        for each, compiler in compilers.items():
            setattr(module, each, compiler.kernel)
        shared_bytes[name] = max(compiler.shared_bytes for compiler in compilers.values())
    print(json.dumps(shared_bytes))


if __name__ == "__main__":
    main()
