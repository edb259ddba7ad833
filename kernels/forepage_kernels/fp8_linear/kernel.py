# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton fp8_linear: weight rows are the left operand, decoded in registers, activations the right one.

Few rows would leave most of the GPU idle, so the columns of a small weight are shared out over several
programs. Into how many depends on the weight alone; each writes fp32 sums, and one more kernel adds them in
order. So a row's result does not depend on how many others there are. More than SPLIT_TOKENS rows are work
enough without.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import decode_e8m0, encode_e4m3, power_of_2, scale_exponent
from forepage_kernels.fp8_linear.weight import FP8_TILE, Fp8Weight
from forepage_kernels.jit import is_interpreted, jit, jit_unspecialised, on_device_of
from forepage_kernels.weight_tiles import FP8_PER_WORD, decode_fp8, interleaved, words

SPLIT_TOKENS = 256
WANTED_PROGRAMS = 256
LEAST_STEPS = 4
"""Of 128 columns, that a program takes before the sums' own traffic outweighs its share."""
SUMMED_COLUMNS = 1024
INTERLEAVED_INSIDE = 64
"""Up to so many tokens a tile, programs part a word's columns themselves: one launch less."""


@dataclass(frozen=True)
class Tile:
    """What a program works on: rows of x and of the weight."""

    tokens: int
    rows: int
    warps: int
    stages: int


TILES = (
    Tile(tokens=16, rows=64, warps=4, stages=4),
    Tile(tokens=32, rows=64, warps=4, stages=4),
    Tile(tokens=64, rows=64, warps=4, stages=3),
    Tile(tokens=128, rows=64, warps=4, stages=3),
)
"""The smallest that holds all rows; the fastest of those measured."""


def fp8_linear(x: Tensor, weight: Fp8Weight, *, quantise: bool) -> Tensor:
    """See the package; bf16 activations (fp32 in the interpreter)."""
    num_tokens, groups, inputs = x.shape
    outputs = weight.values.shape[0] // groups
    out = x.new_empty(num_tokens, groups, outputs)
    if out.numel() == 0:
        return out
    tile = next((tile for tile in TILES if num_tokens <= tile.tokens), TILES[-1])
    steps = -(-inputs // FP8_TILE)
    splits = num_splits(groups * outputs, steps) if num_tokens <= SPLIT_TOKENS else 1
    sums = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    with on_device_of(x):
        multiply = _multiply_fp8 if quantise else _multiply
        multiply(x, weight, sums, tile, splits)
        if splits > 1:
            add_sums[(-(-out.numel() // SUMMED_COLUMNS),)](
                sums, out, out.numel(), SPLITS=splits, COLUMNS=SUMMED_COLUMNS
            )
    return out


def num_splits(outputs: int, steps: int) -> int:
    """Into how many parts a weight of so many rows and steps of columns is cut."""
    programs = -(-outputs // TILES[0].rows)
    return max(1, min(-(-WANTED_PROGRAMS // programs), steps // LEAST_STEPS))


def _grid(tile: Tile, splits: int, shape: torch.Size) -> tuple[int, int, int]:
    num_tokens, groups, outputs = shape[-3:]
    return (-(-outputs // tile.rows) * splits, -(-num_tokens // tile.tokens), groups)


def _multiply(x: Tensor, weight: Fp8Weight, sums: Tensor, tile: Tile, splits: int) -> None:
    num_tokens, groups, inputs = x.shape
    is_long = tile.tokens > INTERLEAVED_INSIDE
    multiply_words[_grid(tile, splits, sums.shape)](
        interleaved(x, FP8_PER_WORD) if is_long else x,
        words(weight.values),
        weight.scales.view(torch.uint8),
        sums,
        num_tokens,
        groups,
        weight.part_rows,
        INPUTS=inputs,
        OUTPUTS=sums.shape[-1],
        SPLITS=splits,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        INTERLEAVED=is_long,
        BF16=x.dtype == torch.bfloat16 and not is_interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _multiply_fp8(x: Tensor, weight: Fp8Weight, sums: Tensor, tile: Tile, splits: int) -> None:
    num_tokens, groups, inputs = x.shape
    steps = -(-inputs // FP8_TILE)
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_tokens, groups, steps, dtype=torch.float32, device=x.device)
    quantise_rows[(num_tokens * groups, steps)](x, values, scales, inputs, steps, TILE=FP8_TILE)
    multiply_fp8[_grid(tile, splits, sums.shape)](
        values.view(torch.float8_e4m3fn),
        scales,
        weight.values,
        weight.scales.view(torch.uint8),
        sums,
        num_tokens,
        groups,
        weight.part_rows,
        INPUTS=inputs,
        OUTPUTS=sums.shape[-1],
        SPLITS=splits,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@jit_unspecialised("num_tokens", "groups", "part_rows")
def multiply_words(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    num_tokens: tl.tensor,
    groups: tl.tensor,
    part_rows: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """x [n, G, I], or [n, G, 2, I / 2] by place in a word -> sums [SPLITS, n, G, O]."""
    half: tl.constexpr = INPUTS // 2
    words: tl.constexpr = 64
    num_steps: tl.constexpr = (INPUTS + 127) // 128
    span: tl.constexpr = (num_steps + SPLITS - 1) // SPLITS
    split, group = tl.program_id(0) % SPLITS, tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    inside = row < OUTPUTS
    weight_row = (group * OUTPUTS + row).to(tl.int64)
    scale_row = scales + scale_row_of(weight_row, part_rows) * num_steps
    packed_row = values + weight_row[:, None] * half
    line = (tl.minimum(token, num_tokens - 1).to(tl.int64) * groups + group) * INPUTS
    first, last = split * span, tl.minimum((split + 1) * span, num_steps)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    scale = tl.load(scale_row + first, mask=inside & (first < last), other=0)
    for step in range(first, last):
        # A step's scales are asked for one step early: too few bytes for an asynchronous copy.
        code = scale
        scale = tl.load(scale_row + step + 1, mask=inside & (step + 1 < last), other=0)
        word = step * words + tl.arange(0, words)
        is_word = (word < half)[None, :]
        if INTERLEAVED:
            even = tl.load(x + line[:, None] + word[None, :], mask=is_word, other=0.0)
            odd = tl.load(x + half + line[:, None] + word[None, :], mask=is_word, other=0.0)
        else:
            column = step * (2 * words) + tl.arange(0, 2 * words)
            both = tl.load(x + line[:, None] + column[None, :], mask=(column < INPUTS)[None, :], other=0.0)
            even, odd = tl.split(tl.reshape(both, [TOKENS, words, 2]))
        packed = tl.load(packed_row + word[None, :], mask=inside[:, None] & is_word, other=0)
        w0, w1 = decode_fp8(packed, BF16)
        part = tl.dot(w0, tl.trans(even), input_precision="ieee")
        part = tl.dot(w1, tl.trans(odd), part, input_precision="ieee")
        acc += part * decode_e8m0(code.to(tl.int32))[:, None]
    store_sums(sums, acc, split, token, group, row, num_tokens, groups, OUTPUTS)


@jit_unspecialised("num_tokens", "groups", "part_rows")
def multiply_fp8(
    x: tl.tensor,
    x_scales: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    num_tokens: tl.tensor,
    groups: tl.tensor,
    part_rows: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """x e4m3 [n, G, I], x_scales f32 [n, G, I / 128] -> sums [SPLITS, n, G, O].

    Hopper sums fp8 products in about 14 bits: 128 columns at a time, then scaled and added in fp32.
    """
    num_steps: tl.constexpr = (INPUTS + 127) // 128
    span: tl.constexpr = (num_steps + SPLITS - 1) // SPLITS
    split, group = tl.program_id(0) % SPLITS, tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    inside = row < OUTPUTS
    weight_row = (group * OUTPUTS + row).to(tl.int64)
    scale_row = scales + scale_row_of(weight_row, part_rows) * num_steps
    line = tl.minimum(token, num_tokens - 1).to(tl.int64) * groups + group
    first, last = split * span, tl.minimum((split + 1) * span, num_steps)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(first, last):
        column = step * 128 + tl.arange(0, 128)
        is_column = (column < INPUTS)[None, :]
        tokens = tl.load(x + line[:, None] * INPUTS + column[None, :], mask=is_column, other=0.0)
        mask = inside[:, None] & is_column
        weight = tl.load(values + weight_row[:, None] * INPUTS + column[None, :], mask=mask, other=0.0)
        token_scale = tl.load(x_scales + line * num_steps + step)
        scale = decode_e8m0(tl.load(scale_row + step, mask=inside, other=0).to(tl.int32))
        acc += tl.dot(weight, tl.trans(tokens)) * (scale[:, None] * token_scale[None, :])
    store_sums(sums, acc, split, token, group, row, num_tokens, groups, OUTPUTS)


@jit
def scale_row_of(row: tl.tensor, part_rows: tl.tensor) -> tl.tensor:
    """Which row of scales belongs to a weight row i64."""
    return row // part_rows * ((part_rows + 127) // 128) + row % part_rows // 128


@jit
def store_sums(
    sums: tl.tensor,
    acc: tl.tensor,
    split: tl.tensor,
    token: tl.tensor,
    group: tl.tensor,
    row: tl.tensor,
    num_tokens: tl.tensor,
    groups: tl.tensor,
    OUTPUTS: tl.constexpr,
) -> None:
    """acc f32 [ROWS, TOKENS] to its place in sums [SPLITS, n, G, O]."""
    line = (split.to(tl.int64) * num_tokens + token) * groups + group
    mask = (token < num_tokens)[:, None] & (row < OUTPUTS)[None, :]
    place = sums + line[:, None] * OUTPUTS + row[None, :]
    tl.store(place, tl.trans(acc).to(sums.dtype.element_ty), mask=mask)


@jit_unspecialised("count")
def add_sums(
    sums: tl.tensor, out: tl.tensor, count: tl.tensor, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """sums f32 [SPLITS, count] -> out [count], added in order."""
    index = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * count.to(tl.int64) + index, mask=index < count, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < count)


@jit_unspecialised("inputs", "steps")
def quantise_rows(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    inputs: tl.tensor,
    steps: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """x [rows, I] -> e4m3 codes u8 [rows, I] and scales f32 [rows, steps], one program a row and tile."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < inputs
    tile = tl.load(x + row * inputs + column, mask=mask, other=0.0).to(tl.float32)
    exponent = scale_exponent(tl.max(tl.abs(tile), axis=0))
    tl.store(values + row * inputs + column, encode_e4m3(tile * power_of_2(254 - exponent)), mask=mask)
    tl.store(scales + row * steps + tl.program_id(1), power_of_2(exponent))
