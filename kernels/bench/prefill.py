"""Cases of prefill: decoding a layer's rows and keys, scoring and attending a chunk of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import flash
from bench.attention import filled_pool
from bench.case import Case, Ceiling, WrongResultError, worst_error
from bench.scoring import random_keys
from forepage_kernels.layout import KeyPool, RowPool, load_rows
from forepage_kernels.prefill_attention import prefill_attention
from forepage_kernels.prefill_attention.reference import prefill_attention as prefill_attention_reference
from forepage_kernels.prefill_indexer import prefill_indexer
from forepage_kernels.prefill_indexer.reference import prefill_indexer as prefill_indexer_reference
from forepage_kernels.unpack_rows import unpack_rows

END_TOKENS = 524_288
"""The chunks measured end here."""
C4_RATIO, C128_RATIO = 4, 128
UNPACKED_BLOCKS = 2_048
TINY_HEADS, TINY_DIMS = 8, 128
CHECKED_TOKENS = 8
BF16_TOLERANCE = 2e-2


def prefill_cases(device: torch.device) -> Iterator[Case]:
    """At V4-Flash's sizes and at forepage-tiny's."""
    yield _unpack_case(filled_pool(flash.ROWS, UNPACKED_BLOCKS, device))
    keys = random_keys(UNPACKED_BLOCKS, 1, device)
    yield _unpack_case(KeyPool(keys, 0, flash.KEYS))
    yield _indexer_case(256, flash.INDEX_HEADS, device)
    yield _indexer_case(512, TINY_HEADS, device)
    for tokens, heads, dims in ((1_024, flash.HEADS, flash.HEAD_DIM), (4_096, TINY_HEADS, TINY_DIMS)):
        yield _attention_case(tokens, heads, dims, C4_RATIO, device)
        yield _attention_case(tokens, heads, dims, C128_RATIO, device)


def _unpack_case(pool: RowPool | KeyPool) -> Case:
    slots = torch.randperm(pool.num_slots, device=pool.bytes.device)

    def check() -> float:
        got, wanted = unpack_rows(pool, slots, torch.bfloat16), load_rows(pool, slots)
        if not torch.equal(got.float(), wanted):
            raise WrongResultError("unpack_rows: another value than the stored one")
        return 0.0

    layout, kind = pool.layout, "rows" if isinstance(pool, RowPool) else "keys"
    return Case(
        kernel="unpack_rows",
        shape=f"{pool.num_slots} {kind} of {layout.dims}, scattered",
        dtype="fp8 -> bf16",
        num_bytes=pool.num_slots * (layout.value_bytes + layout.scale_bytes + 2 * layout.dims),
        flops=0,
        ceilings=[Ceiling.MEMORY],
        calls=[lambda: unpack_rows(pool, slots, torch.bfloat16)],
        check=check,
        torch_call=lambda: load_rows(pool, slots).bfloat16(),
    )


def _indexer_case(tokens: int, heads: int, device: torch.device) -> Case:
    dims, entries = flash.INDEX_DIMS, END_TOKENS // C4_RATIO
    q, weights = (
        torch.randn(tokens, heads, dims, device=device),
        torch.randn(tokens, heads, device=device) / heads,
    )
    keys = torch.randn(entries, dims, device=device).bfloat16()

    def score(first: int, last: int) -> Tensor:
        start = END_TOKENS - tokens + first
        return prefill_indexer(q[first:last], weights[first:last], keys, start=start, ratio=C4_RATIO)

    def check() -> float:
        first = tokens - CHECKED_TOKENS
        got = score(first, tokens)
        wanted = prefill_indexer_reference(
            q[first:], weights[first:], keys, start=END_TOKENS - CHECKED_TOKENS, ratio=C4_RATIO
        )
        if not torch.equal(got.isinf(), wanted.isinf()):
            raise WrongResultError("prefill_indexer: other entries are open")
        return worst_error("prefill_indexer", got.clamp(min=-1e6), wanted.clamp(min=-1e6), tolerance=1e-4)

    return Case(
        kernel="prefill_indexer",
        shape=f"{tokens} tokens x {entries} entries x {heads} heads x {dims}",
        dtype="bf16 keys, f32 queries",
        num_bytes=tokens * entries * 4 + keys.numel() * 2 + q.numel() * 4,
        flops=2 * tokens * entries * heads * dims,
        ceilings=[Ceiling.MEMORY, Ceiling.BF16],
        calls=[lambda: score(0, tokens)],
        check=check,
    )


def _attention_case(tokens: int, heads: int, dims: int, ratio: int, device: torch.device) -> Case:
    start, entries = END_TOKENS - tokens, END_TOKENS // ratio
    rows = torch.randn(entries, dims, device=device).bfloat16()
    window = torch.randn(tokens + flash.WINDOW - 1, dims, device=device).bfloat16()
    q = torch.randn(tokens, heads, dims, device=device).bfloat16()
    sinks = torch.randn(heads, device=device)
    selected = None
    if ratio == C4_RATIO:
        closed = start // ratio
        drawn = [torch.randperm(closed, device=device)[: flash.TOPK].sort().values for _ in range(tokens)]
        selected = torch.stack(drawn)

    def attend(last: int, query: Tensor, kv: Tensor, near: Tensor, *, plain: bool) -> Tensor:
        run = prefill_attention_reference if plain else prefill_attention
        return run(
            query[:last],
            kv,
            None if selected is None else selected[:last],
            near[: flash.WINDOW - 1 + last],
            sinks,
            start=start,
            ratio=ratio,
            window_tokens=flash.WINDOW,
            softmax_scale=dims**-0.5,
        )

    def check() -> float:
        got = attend(CHECKED_TOKENS, q, rows, window, plain=False)
        wanted = attend(CHECKED_TOKENS, q.float(), rows.float(), window.float(), plain=True)
        return worst_error("prefill_attention", got, wanted, tolerance=BF16_TOLERANCE)

    attended = tokens * ((flash.TOPK if selected is not None else entries) + flash.WINDOW)
    kind = f"{flash.TOPK} selected" if selected is not None else f"all {entries}"
    return Case(
        kernel="prefill_attention",
        shape=f"{tokens} tokens, {heads} heads x {dims}, {kind} + {flash.WINDOW} rows",
        dtype="bf16",
        num_bytes=2 * q.numel() * 2 + 2 * dims * (attended if selected is not None else entries + tokens),
        flops=4 * attended * heads * dims,
        ceilings=[Ceiling.MEMORY, Ceiling.BF16],
        calls=[lambda: attend(tokens, q, rows, window, plain=False)],
        check=check,
    )
