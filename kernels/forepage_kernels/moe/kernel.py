# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton moe: pairs sorted by expert, then two products over tiles of one expert's pairs, then the sum.

Weights are the left operand, decoded in registers, tokens the right one: a product is then the same
sequence of tensor core steps however many tokens a tile holds, so a token's result does not depend on how
many others there are. The grid covers the most tiles there can be; those that no pair fell into end at once.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, next_power_of_2, on_device_of
from forepage_kernels.moe.experts import Fp4Experts
from forepage_kernels.moe.sorting import SortedPairs, sort_pairs
from forepage_kernels.weight_tiles import FP4_PER_WORD, decode_fp4, interleaved, words

COMBINED_COLUMNS = 1024
INTERLEAVED_INSIDE = 64
"""Up to so many pairs a tile, programs part a word's columns themselves: one launch less."""


@dataclass(frozen=True)
class Tile:
    """What a program works on: pairs, weight rows, and words (4 columns) of a step."""

    tokens: int
    rows: int
    words: int
    warps: int
    stages: int


TILES = (
    Tile(tokens=16, rows=64, words=64, warps=4, stages=3),
    Tile(tokens=32, rows=64, words=64, warps=4, stages=3),
    Tile(tokens=64, rows=64, words=64, warps=4, stages=2),
    Tile(tokens=128, rows=128, words=64, warps=8, stages=2),
)
"""The smallest that holds an expert's pairs, were all experts chosen alike; the fastest of those measured.

All step by as many words: another number adds the same products in another order.
"""


def moe(x: Tensor, chosen: Tensor, weights: Tensor, experts: Fp4Experts, *, limit: float) -> Tensor:
    """See the package; bf16 activations (fp32 in the interpreter)."""
    (num_tokens, width), num_pairs = x.shape, chosen.numel()
    out = torch.empty(num_tokens, width, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    tile = tile_for(num_pairs, experts.total)
    num_experts, size = experts.w13.shape[0], experts.size
    pairs = sort_pairs(chosen, first=experts.first, num_experts=num_experts, tile_tokens=tile.tokens)
    hidden = x.new_empty(num_pairs, size)
    outputs = x.new_empty(num_pairs, width)
    with on_device_of(x):
        launch_gate_up(x, experts, pairs, hidden, tile, chosen.shape[1], limit)
        launch_down(hidden, experts, pairs, outputs, tile)
        launch_combine(outputs, chosen, weights, experts, out)
    return out


def tile_for(num_pairs: int, num_experts: int) -> Tile:
    """By how many pairs an expert gets on average."""
    average = num_pairs / num_experts
    return next((tile for tile in TILES if average <= tile.tokens), TILES[-1])


def launch_gate_up(
    x: Tensor, experts: Fp4Experts, pairs: SortedPairs, hidden: Tensor, tile: Tile, choices: int, limit: float
) -> None:
    """See the kernel; x [n, D]."""
    is_long = tile.tokens > INTERLEAVED_INSIDE
    gate_up[(-(-experts.size // tile.rows), pairs.tiles.shape[0])](
        interleaved(x, FP4_PER_WORD) if is_long else x,
        pairs.order,
        pairs.tiles,
        words(experts.w13),
        experts.w13_scales,
        hidden,
        choices,
        limit,
        SIZE=experts.size,
        WIDTH=experts.width,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        WORDS=tile.words,
        INTERLEAVED=is_long,
        BF16=x.dtype == torch.bfloat16 and not is_interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_down(hidden: Tensor, experts: Fp4Experts, pairs: SortedPairs, outputs: Tensor, tile: Tile) -> None:
    """See the kernel."""
    down[(-(-experts.width // tile.rows), pairs.tiles.shape[0])](
        hidden,
        pairs.order,
        pairs.tiles,
        words(experts.w2),
        experts.w2_scales,
        outputs,
        SIZE=experts.size,
        WIDTH=experts.width,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        WORDS=tile.words,
        BF16=hidden.dtype == torch.bfloat16 and not is_interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_combine(
    outputs: Tensor, chosen: Tensor, weights: Tensor, experts: Fp4Experts, out: Tensor
) -> None:
    """See the kernel."""
    num_tokens, width = out.shape
    columns = min(COMBINED_COLUMNS, next_power_of_2(width))
    combine[(num_tokens, -(-width // columns))](
        outputs,
        chosen,
        weights,
        out,
        experts.first,
        experts.w13.shape[0],
        width,
        CHOICES=chosen.shape[1],
        COLUMNS=columns,
    )


@jit_unspecialised("choices")
def gate_up(
    x: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    w13: tl.tensor,
    scales: tl.tensor,
    hidden: tl.tensor,
    choices: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """x [n, D], or [n, 4, D / 4] by place in a word -> hidden [P, 4, M / 4], sorted as `order` is."""
    quarter: tl.constexpr = WIDTH // 4
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    if expert < 0:
        return
    begin, count = tl.load(tile + 1).to(tl.int64), tl.load(tile + 2)
    nth = tl.arange(0, TOKENS)
    token = tl.load(order + begin + nth, mask=nth < count, other=0) // choices
    inputs = x + token.to(tl.int64)[:, None] * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < SIZE
    gate_row = expert * (2 * SIZE) + row
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range((quarter + WORDS - 1) // WORDS):
        first = step * WORDS
        x0, x1, x2, x3 = load_inputs(inputs, first, quarter, TOKENS, WORDS, INTERLEAVED)
        w0, w1, w2, w3 = load_weights(w13, scales, gate_row, inside, step, quarter, WORDS, BF16)
        gate = dot4(w0, w1, w2, w3, x0, x1, x2, x3, gate)
        w0, w1, w2, w3 = load_weights(w13, scales, gate_row + SIZE, inside, step, quarter, WORDS, BF16)
        up = dot4(w0, w1, w2, w3, x0, x1, x2, x3, up)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    active = gate / (1.0 + tl.exp(-gate)) * up  # [ROWS, TOKENS]
    low, high = tl.split(tl.reshape(tl.trans(active), [TOKENS, ROWS // 4, 2, 2]))
    h0, h2 = tl.split(low)
    h1, h3 = tl.split(high)
    word = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    place = hidden + (begin + nth)[:, None] * SIZE + word[None, :]
    mask = (nth < count)[:, None] & (word < SIZE // 4)[None, :]
    kind = hidden.dtype.element_ty
    tl.store(place, h0.to(kind), mask=mask)
    tl.store(place + SIZE // 4, h1.to(kind), mask=mask)
    tl.store(place + SIZE // 2, h2.to(kind), mask=mask)
    tl.store(place + SIZE // 4 * 3, h3.to(kind), mask=mask)


@jit
def down(
    hidden: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    w2: tl.tensor,
    scales: tl.tensor,
    outputs: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """hidden as `gate_up` leaves it -> outputs [P, D], each in its pair's own row."""
    quarter: tl.constexpr = SIZE // 4
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    if expert < 0:
        return
    begin, count = tl.load(tile + 1).to(tl.int64), tl.load(tile + 2)
    nth = tl.arange(0, TOKENS)
    inputs = hidden + (begin + tl.minimum(nth, count - 1))[:, None] * SIZE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < WIDTH
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range((quarter + WORDS - 1) // WORDS):
        x0, x1, x2, x3 = load_inputs(inputs, step * WORDS, quarter, TOKENS, WORDS, True)
        weight_row = expert * WIDTH + row
        v0, v1, v2, v3 = load_weights(w2, scales, weight_row, inside, step, quarter, WORDS, BF16)
        acc = dot4(v0, v1, v2, v3, x0, x1, x2, x3, acc)
    pair = tl.load(order + begin + nth, mask=nth < count, other=0).to(tl.int64)
    place = outputs + pair[:, None] * WIDTH + row[None, :]
    mask = (nth < count)[:, None] & inside[None, :]
    tl.store(place, tl.trans(acc).to(outputs.dtype.element_ty), mask=mask)


@jit
def load_inputs(
    inputs: tl.tensor,
    first: tl.tensor,
    QUARTER: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Columns of WORDS words from word `first` on, of rows at `inputs` [T, 1]: [T, WORDS] for each place."""
    if INTERLEAVED:
        word = first + tl.arange(0, WORDS)
        mask = (word < QUARTER)[None, :]
        x0 = tl.load(inputs + word[None, :], mask=mask, other=0.0)
        x1 = tl.load(inputs + QUARTER + word[None, :], mask=mask, other=0.0)
        x2 = tl.load(inputs + 2 * QUARTER + word[None, :], mask=mask, other=0.0)
        x3 = tl.load(inputs + 3 * QUARTER + word[None, :], mask=mask, other=0.0)
    else:
        column = first * 4 + tl.arange(0, WORDS * 4)
        columns = tl.load(inputs + column[None, :], mask=(column < QUARTER * 4)[None, :], other=0.0)
        low, high = tl.split(tl.reshape(columns, [TOKENS, WORDS, 2, 2]))
        x0, x2 = tl.split(low)
        x1, x3 = tl.split(high)
    return x0, x1, x2, x3


@jit
def load_weights(
    values: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    step: tl.tensor,
    QUARTER: tl.constexpr,
    WORDS: tl.constexpr,
    BF16: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The step's words of weight rows i64 [N], decoded: [N, WORDS] for each place in a word."""
    word = step * WORDS + tl.arange(0, WORDS)
    group = step * (WORDS // 8) + tl.arange(0, WORDS // 8)
    mask = inside[:, None] & (word < QUARTER)[None, :]
    packed = tl.load(values + row[:, None] * QUARTER + word[None, :], mask=mask, other=0)
    mask = inside[:, None] & (group < QUARTER // 8)[None, :]
    codes = tl.load(scales + row[:, None] * (QUARTER // 8) + group[None, :], mask=mask, other=0)
    w0, w1, w2, w3 = decode_fp4(packed, codes, BF16)
    return w0, w1, w2, w3


@jit
def dot4(
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    w3: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    acc: tl.tensor,
) -> tl.tensor:
    """acc [N, T] plus the product over all four places."""
    acc = tl.dot(w0, tl.trans(x0), acc, input_precision="ieee")
    acc = tl.dot(w1, tl.trans(x1), acc, input_precision="ieee")
    acc = tl.dot(w2, tl.trans(x2), acc, input_precision="ieee")
    return tl.dot(w3, tl.trans(x3), acc, input_precision="ieee")


@jit_unspecialised("first", "num_experts")
def combine(
    outputs: tl.tensor,
    chosen: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    num_experts: tl.tensor,
    width: tl.tensor,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out f32 [n, D]: each token's outputs by weight; rows of other ranks' pairs are never read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(chosen + pair) - first
        is_ours = (expert >= 0) & (expert < num_experts)
        output = tl.load(outputs + pair * width + column, mask=(column < width) & is_ours, other=0.0)
        weight = tl.load(weights + pair)
        total += output.to(tl.float32) * tl.where(is_ours, weight, 0.0)
    tl.store(out + token * width + column, total, mask=column < width)
