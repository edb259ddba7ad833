"""Compiles every kernel for Hopper (sm_90) as its launcher would launch it; no GPU is used.

Run by test_compile_gate in its own process, because TRITON_INTERPRET must not be set here. Launchers
run on small CPU tensors, with the kernel replaced by a compiler.
Prints one JSON object: variant -> bytes of shared memory a program takes.
"""

import json
from collections.abc import Callable
from types import ModuleType

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
import forepage_kernels.sparse_decode.hopper as sparse_decode_hopper
import forepage_kernels.sparse_decode.kernel as sparse_decode
import forepage_kernels.unpack_rows.kernel as unpack_rows
from forepage.training.backbone import sinkhorn_kernel
from forepage_kernels.layout import KeyLayout, RowLayout
from rigs.kernel_compiler import CompilerInsteadOfLaunch
from rigs.kernel_launches import (
    BF16,
    F32,
    FLASH,
    KEY,
    MXFP4_KEY,
    SEEDED,
    key_pool,
    row_pool,
    run_compress_quantize,
    run_compress_token,
    run_draw_sorted,
    run_fp8_linear,
    run_gather_blocks,
    run_gather_rows,
    run_hadamard,
    run_memory_indexer,
    run_mix_streams,
    run_moe,
    run_native_indexer,
    run_norm,
    run_prefill_attention,
    run_prefill_indexer,
    run_resolve_rows,
    run_select_topk,
    run_sinkhorn,
    run_sparse_decode,
    run_turn,
    run_unpack_rows,
)

Variant = tuple[ModuleType | tuple[ModuleType, ...], str, Callable[[], None]]
"""The module of the kernels, or modules, the kernels that are launched, and a call of the launcher."""
VARIANTS: dict[str, Variant] = {
    "gather_blocks": (gather_blocks, "copy_blocks", lambda: run_gather_blocks(987_008)),
    "gather_blocks-odd": (gather_blocks, "copy_blocks", lambda: run_gather_blocks(1008)),
    "gather_rows": (gather_rows, "copy_rows", lambda: run_gather_rows(FLASH)),
    "gather_rows-fp32": (gather_rows, "copy_rows", lambda: run_gather_rows(RowLayout(1, 64, 64, "fp32"))),
    "memory_indexer": (memory_indexer, "stream_entries", lambda: run_memory_indexer(128, 3, F32)),
    "memory_indexer-bf16": (memory_indexer, "stream_entries", lambda: run_memory_indexer(64, 3, BF16)),
    "memory_indexer-129-heads": (memory_indexer, "score_entries", lambda: run_memory_indexer(129, 3, F32)),
    "memory_indexer-ones": (memory_indexer, "stream_entries", lambda: run_memory_indexer(1, 1, F32)),
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
    "mix_streams-project": (mix_projection, "project", lambda: run_mix_streams("project", 4096, BF16)),
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
    **{
        f"sparse_decode-overlapped-{heads}x{selected}": (
            (sparse_decode_hopper, sparse_decode),
            "attend_overlapped join_parts",
            lambda heads=heads, selected=selected: run_sparse_decode(  # type: ignore[misc]
                FLASH, heads, selected, BF16, sparse_decode.OVERLAPPED_TILE
            ),
        )
        for heads, selected in ((64, 512), (128, 2048), (8, 0))
    },
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
    for name, (where, kernel_names, launch) in VARIANTS.items():
        modules = where if isinstance(where, tuple) else (where,)
        owners = {each: next(one for one in modules if hasattr(one, each)) for each in kernel_names.split()}
        compilers = {each: CompilerInsteadOfLaunch(getattr(owner, each)) for each, owner in owners.items()}
        for each, compiler in compilers.items():
            setattr(owners[each], each, compiler)
        launch()
        for each, compiler in compilers.items():
            setattr(owners[each], each, compiler.kernel)
        shared_bytes[name] = max(compiler.shared_bytes for compiler in compilers.values())
    print(json.dumps(shared_bytes))


if __name__ == "__main__":
    main()
