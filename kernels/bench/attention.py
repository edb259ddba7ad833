"""Cases of the attention path: sparse decode over fp8 rows, and the compressor with its quantised store."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import flash
from bench.case import Case, Ceiling, worst_error
from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.compress_quantize.reference import compress_quantize as compress_quantize_reference
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool, load_rows, store_rows
from forepage_kernels.sparse_decode import sparse_decode
from forepage_kernels.sparse_decode.reference import sparse_decode as sparse_decode_reference

BATCHES = (1, 16, 64, 128, 256)
CHECKED_BATCH = 8
BF16_TOLERANCE = 2e-2
POOL_BLOCKS = 4_096
OVERLAP = 8
"""Tokens a c4 entry is pooled from: its own four and the four before them."""
DECODE_ENTRIES, PREFILL_ENTRIES = 64, 2_048
EPS = 1e-6


def attention_cases(device: torch.device) -> Iterator[Case]:
    """Decode attention at every batch; closing rows and keys in decode and prefill."""
    pool = filled_pool(flash.ROWS, POOL_BLOCKS, device)
    for batch in BATCHES:
        yield _attention_case(pool, batch, device)
    for entries in (DECODE_ENTRIES, PREFILL_ENTRIES):
        yield _compress_case(flash.ROWS, entries, flash.HEAD_DIM, device)
        yield _compress_case(flash.KEYS, entries, flash.INDEX_DIMS, device)


def filled_pool(layout: RowLayout, blocks: int, device: torch.device) -> RowPool:
    """A pool of random rows."""
    pool = RowPool(torch.zeros(blocks, layout.plane_bytes, dtype=torch.uint8, device=device), 0, layout)
    slots = torch.arange(pool.num_slots, device=device)
    for part in slots.split(1 << 16):
        store_rows(pool, part, torch.randn(len(part), layout.head_dim, device=device))
    return pool


def _attention_case(pool: RowPool, batch: int, device: torch.device) -> Case:
    window = filled_pool(flash.WINDOW_ROWS, batch, device)
    q = torch.randn(batch, flash.HEADS, flash.HEAD_DIM, device=device, dtype=torch.bfloat16)
    rows = torch.stack([torch.randperm(pool.num_slots, device=device)[: flash.TOPK] for _ in range(batch)])
    ring = torch.arange(batch * flash.WINDOW, device=device).view(batch, flash.WINDOW)
    sinks = torch.randn(flash.HEADS, device=device)
    scale = flash.HEAD_DIM**-0.5

    def attend() -> Tensor:
        return sparse_decode(q, pool, rows, window, ring, sinks, softmax_scale=scale)

    def attend_in_torch() -> Tensor:
        kv = torch.cat((load_rows(pool, rows), load_rows(window, ring)), dim=1).to(q.dtype)  # [B, K + W, d]
        scores = torch.einsum("bhd,bnd->bhn", q, kv).float() * scale
        scores = torch.cat((scores, sinks.view(1, -1, 1).expand(batch, -1, 1)), dim=-1)
        return torch.einsum("bhn,bnd->bhd", scores.softmax(-1)[..., :-1].to(q.dtype), kv)

    def check() -> float:
        few = min(batch, CHECKED_BATCH)
        got = sparse_decode(q[:few], pool, rows[:few], window, ring[:few], sinks, softmax_scale=scale)
        wanted = sparse_decode_reference(
            q[:few].float(), pool, rows[:few], window, ring[:few], sinks, softmax_scale=scale
        )
        return worst_error("sparse_decode", got, wanted, tolerance=BF16_TOLERANCE)

    attended = batch * (flash.TOPK + flash.WINDOW)
    return Case(
        kernel="sparse_decode",
        shape=f"batch {batch}, {flash.HEADS} heads x {flash.HEAD_DIM}, {flash.TOPK} + {flash.WINDOW} rows",
        dtype="fp8 rows, bf16 queries",
        num_bytes=attended * flash.ROW_BYTES + 2 * q.numel() * q.element_size(),
        flops=4 * attended * flash.HEADS * flash.HEAD_DIM,
        ceilings=[Ceiling.MEMORY, Ceiling.BF16],
        calls=[attend],
        check=check,
        torch_call=attend_in_torch,
    )


def _compress_case(layout: RowLayout | KeyLayout, entries: int, dims: int, device: torch.device) -> Case:
    blocks = -(-entries // layout.entries)
    stored = torch.zeros(blocks, layout.plane_bytes, dtype=torch.uint8, device=device)
    pool: RowPool | KeyPool
    pool = RowPool(stored, 0, layout) if isinstance(layout, RowLayout) else KeyPool(stored, 0, layout)
    kv, gate = (torch.randn(entries, OVERLAP, dims, device=device) for _ in range(2))
    weight = torch.rand(dims, device=device) + 0.5
    angle = torch.rand(entries, flash.ROPE_DIMS // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    slots = torch.arange(entries, device=device)

    def close(into: RowPool | KeyPool) -> None:
        compress_quantize(kv, gate, weight, cos, sin, into, slots, rope_dims=flash.ROPE_DIMS, eps=EPS)

    def check() -> float:
        pool.bytes.fill_(0xFF)
        close(pool)
        wanted = type(pool)(torch.zeros_like(pool.bytes), 0, pool.layout)  # type: ignore[arg-type]
        compress_quantize_reference(
            kv, gate, weight, cos, sin, wanted, slots, rope_dims=flash.ROPE_DIMS, eps=EPS
        )
        # A value on the border between two codes may round either way: one e4m3 step, 1/8 of it.
        return worst_error(
            "compress_quantize", load_rows(pool, slots), load_rows(wanted, slots), tolerance=0.13
        )

    kind = "rows" if isinstance(layout, RowLayout) else "keys"
    return Case(
        kernel="compress_quantize",
        shape=f"{entries} {kind} of {OVERLAP} x {dims}",
        dtype="f32 -> fp8",
        num_bytes=8 * kv.numel() + entries * (layout.value_bytes + layout.scale_bytes),
        flops=0,
        ceilings=[Ceiling.MEMORY],
        calls=[lambda: close(pool)],
        check=check,
    )
