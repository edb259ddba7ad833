# ruff: noqa: N803  (constexpr parameters are upper case, as everywhere in Triton)
"""Triton's encoders and decoders against torch's, bit for bit, on every code, tie and boundary."""

import torch
import triton.language as tl
from torch import Tensor

from forepage_kernels.codec import (
    decode_e8m0,
    encode_bf16,
    encode_e4m3,
    load_bf16,
    load_e4m3,
    load_f32,
    load_mxfp4,
    power_of_2,
    scale_exponent,
)
from forepage_kernels.compress_quantize.kernel import hadamard as hadamard_tile
from forepage_kernels.compress_quantize.kernel import store_key, store_mxfp4_key, store_row
from forepage_kernels.jit import jit, next_power_of_2
from forepage_kernels.layout import (
    KeyLayout,
    KeyPool,
    RowLayout,
    RowPool,
    decode_keys,
    encode_keys,
    encode_rows,
    hadamard,
    store_rows,
)

TILE = 1024


@jit
def encode_all(
    x: tl.tensor, e4m3: tl.tensor, bf16: tl.tensor, exponent: tl.tensor, TILE: tl.constexpr
) -> None:
    """Encode one tile of x f32 each way: e4m3 u8, bf16 u16, biased scale exponent i32."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(x + index)
    tl.store(e4m3 + index, encode_e4m3(value))
    tl.store(bf16 + index, encode_bf16(value))
    tl.store(exponent + index, scale_exponent(tl.abs(value)))


@jit
def decode_all(
    codes: tl.tensor, e4m3: tl.tensor, bf16: tl.tensor, f32: tl.tensor, TILE: tl.constexpr
) -> None:
    """Decode bytes u8 [4 * TILE] as e4m3 [TILE], bf16 [TILE] and f32 [TILE], all to f32."""
    index = tl.arange(0, TILE)
    everywhere = index >= 0
    tl.store(e4m3 + index, load_e4m3(codes + index, everywhere))
    tl.store(bf16 + index, load_bf16(codes + index * 0, index, everywhere))
    tl.store(f32 + index, load_f32(codes + index * 4, everywhere))


@jit
def store_all_rows(
    x: tl.tensor,
    pool: tl.tensor,
    ENTRIES: tl.constexpr,
    NOPE: tl.constexpr,
    DIMS: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Row i of x f32 [n, DIMS] -> entry i of the one plane at `pool`."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    value = tl.load(x + row * DIMS + dim, mask=dim < DIMS, other=0.0)
    store_row(value, pool, row, ENTRIES, NOPE, DIMS, SCALE_BYTES, BLOCK_D)


@jit
def store_all_keys(
    x: tl.tensor, rotated: tl.tensor, pool: tl.tensor, ENTRIES: tl.constexpr, DIMS: tl.constexpr
) -> None:
    """Row i of x f32 [n, DIMS] -> entry i of the one plane at `pool`, and unscaled Hadamard to rotated."""
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * DIMS + tl.arange(0, DIMS))
    tl.store(rotated + row * DIMS + tl.arange(0, DIMS), hadamard_tile(value, DIMS))
    store_key(value, pool, row, ENTRIES, DIMS)


def hard_values(limit: float) -> Tensor:
    """f32: every non-negative e4m3 value, the ties between them, and their neighbours; both signs."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, ties))
    up, down = torch.full_like(x, float("inf")), torch.full_like(x, -1.0)
    x = torch.cat((x, torch.nextafter(x, up), torch.nextafter(x, down)))
    x = x[(x >= 0) & (x <= limit)]
    x = torch.cat((x, -x, torch.tensor([1e-30, -1e-38, float("nan")])))
    return torch.cat((x, torch.zeros(-x.shape[0] % TILE)))


def run_encoders(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=device)
    bf16 = torch.zeros(x.shape, dtype=torch.uint16, device=device)
    exponent = torch.zeros(x.shape, dtype=torch.int32, device=device)
    encode_all[(x.shape[0] // TILE,)](x.to(device), codes, bf16, exponent, TILE=TILE)
    return codes.cpu(), bf16.cpu(), exponent.cpu()


def test_e4m3_codes_equal_torchs_on_every_value_tie_and_neighbour(device: torch.device) -> None:
    x = hard_values(448.0)
    codes, _, _ = run_encoders(x, device)
    assert torch.equal(codes, x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_bf16_codes_equal_torchs(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(4 * TILE, generator=generator) * torch.logspace(-30, 30, 4 * TILE)
    x[::2] = (x[::2].view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)  # ties
    _, codes, _ = run_encoders(x, device)
    assert torch.equal(codes.view(torch.int16), x.to(torch.bfloat16).view(torch.int16))
    _, codes, _ = run_encoders(torch.full((TILE,), float("nan")), device)
    assert codes.view(torch.bfloat16).isnan().all()


def test_scale_exponents_equal_the_layouts(device: torch.device) -> None:
    steps = 448.0 * 2.0 ** torch.arange(-30, 30, dtype=torch.float32)
    up = torch.nextafter(steps, torch.full_like(steps, float("inf")))
    down = torch.nextafter(steps, torch.zeros_like(steps))
    x = torch.cat((steps, up, down, torch.tensor([0.0, 1e-4, 1e-10])))
    x = torch.cat((x, torch.zeros(TILE - x.shape[0])))
    _, _, exponent = run_encoders(x, device)
    rows = torch.zeros(TILE, 64)
    rows[:, 3] = x
    _, scales = encode_rows(rows, RowLayout(1, 64, 0, "fp8"))
    assert torch.equal(exponent, scales[:, 0].int())


def test_decoders_equal_torchs_on_every_code(device: torch.device, generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (4 * TILE,), dtype=torch.uint8, generator=generator)
    codes[:256] = torch.arange(256)
    if device.type == "cpu":  # the interpreter decodes e4m3 NaN to a number
        codes[(codes & 0x7F) == 0x7F] = 0x7E
    got = [torch.zeros(TILE, device=device) for _ in range(3)]
    decode_all[(1,)](codes.to(device), *got, TILE=TILE)
    want = [
        codes[:TILE].view(torch.float8_e4m3fn),
        codes[: 2 * TILE].view(torch.bfloat16),
        codes.view(torch.float32),
    ]
    for decoded, expected in zip(got, want, strict=True):
        torch.testing.assert_close(decoded.cpu(), expected.float(), rtol=0, atol=0, equal_nan=True)


def rough(n: int, dims: int, generator: torch.Generator) -> Tensor:
    """f32 [n, dims] whose magnitudes span e4m3's normal and subnormal codes; one row of zeros."""
    x = torch.randn(n, dims, generator=generator) * 10.0 ** torch.randint(
        -5, 4, (n, dims), generator=generator
    )
    x[n // 2] = 0.0
    return x


def test_stored_row_bytes_equal_the_layouts(device: torch.device, generator: torch.Generator) -> None:
    for nope, rope in ((448, 64), (64, 64), (96, 32), (192, 64)):
        layout = RowLayout(63, nope, rope, "fp8")
        x = rough(63, layout.head_dim, generator)
        want = RowPool(torch.full((1, layout.plane_bytes), 0xFF, dtype=torch.uint8), 0, layout)
        got = torch.full_like(want.bytes, 0xFF).to(device)
        store_rows(want, torch.arange(63), x)
        store_all_rows[(63,)](
            x.to(device),
            got,
            ENTRIES=63,
            NOPE=nope,
            DIMS=layout.head_dim,
            SCALE_BYTES=layout.scale_bytes,
            BLOCK_D=next_power_of_2(layout.head_dim),
        )
        assert torch.equal(got.cpu(), want.bytes), layout
        assert torch.equal(encode_rows(x, layout)[0], want.values[0])


def test_stored_key_bytes_and_rotation_equal_the_layouts(
    device: torch.device, generator: torch.Generator
) -> None:
    for dims in (64, 128):
        layout = KeyLayout(64, dims, "fp8")
        x = rough(64, dims, generator)
        want = KeyPool(torch.full((1, layout.plane_bytes), 0xFF, dtype=torch.uint8), 0, layout)
        got = torch.full_like(want.bytes, 0xFF).to(device)
        rotated = torch.full_like(x, float("nan")).to(device)
        store_rows(want, torch.arange(64), x)
        store_all_keys[(64,)](x.to(device), rotated, got, ENTRIES=64, DIMS=dims)
        assert torch.equal(got.cpu(), want.bytes)
        assert torch.equal(rotated.cpu() * float(dims**-0.5), hadamard(x))
        assert torch.equal(encode_keys(x, layout)[0], want.values[0])


@jit
def powers(exponent: tl.tensor, out: tl.tensor, TILE: tl.constexpr) -> None:
    """Biased exponents i32 [TILE] -> f32 [TILE]."""
    index = tl.arange(0, TILE)
    tl.store(out + index, power_of_2(tl.load(exponent + index)))


def test_biased_exponents_give_exact_powers(device: torch.device) -> None:
    exponent = torch.arange(128, dtype=torch.int32) + 64
    out = torch.zeros(128, device=device)
    powers[(1,)](exponent.to(device), out, TILE=128)
    assert torch.equal(out.cpu(), 2.0 ** (exponent - 127).float())


@jit
def store_all_mxfp4(x: tl.tensor, pool: tl.tensor, ENTRIES: tl.constexpr, DIMS: tl.constexpr) -> None:
    """Row i of x f32 [n, DIMS] -> entry i of the one plane at `pool`."""
    row = tl.program_id(0).to(tl.int64)
    store_mxfp4_key(tl.load(x + row * DIMS + tl.arange(0, DIMS)), pool, row, ENTRIES, DIMS)


@jit
def load_all_mxfp4(
    pool: tl.tensor, out: tl.tensor, sound: tl.tensor, N: tl.constexpr, DIMS: tl.constexpr
) -> None:
    """The plane of N keys at `pool`, the last one masked -> f32 [N, DIMS], and [N] NaN where a scale is."""
    key = tl.arange(0, N)
    scales = pool + N * (DIMS // 2) + key * (DIMS // 32)
    value, is_sound = load_mxfp4(pool + key * (DIMS // 2), scales, key < N - 1, N, DIMS)
    tl.store(out + key[:, None] * DIMS + tl.arange(0, DIMS)[None, :], value)
    tl.store(sound + key, is_sound)


@jit
def all_e8m0(out: tl.tensor) -> None:
    """Every UE8M0 code -> f32 [256]."""
    code = tl.arange(0, 256)
    tl.store(out + code, decode_e8m0(code))


def e2m1_hard_values() -> Tensor:
    """f32 [64, 32]: every e2m1 value, tie and their neighbours, both signs; scaled by 1 and by extremes."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    up, down = torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)
    x = torch.cat((x, up[up < 6], down[down >= 0]))
    x = torch.cat((x, -x))
    x = torch.cat((x, torch.zeros(-x.shape[0] % 31))).view(-1, 31)
    x = torch.cat((torch.full((x.shape[0], 1), 6.0), x), dim=1)  # the scale's owner
    x = torch.cat((x, x * 2.0**-126, x * 2.0**100, torch.zeros(1, 32), x * 1e-30))
    return x[torch.arange(64) % x.shape[0]]


def test_stored_mxfp4_bytes_equal_the_layouts(device: torch.device, generator: torch.Generator) -> None:
    not_finite = rough(64, 128, generator)
    not_finite[::3, 70] = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(8)[:22]
    inputs = [rough(64, 64, generator), rough(64, 128, generator), e2m1_hard_values(), not_finite]
    for x in inputs:
        layout = KeyLayout(64, x.shape[1], "mxfp4")
        want = KeyPool(torch.full((1, layout.plane_bytes), 0xFF, dtype=torch.uint8), 0, layout)
        got = torch.full_like(want.bytes, 0xFF).to(device)
        store_rows(want, torch.arange(64), x)
        store_all_mxfp4[(64,)](x.to(device), got, ENTRIES=64, DIMS=x.shape[1])
        assert torch.equal(got.cpu(), want.bytes)


def test_loaded_mxfp4_keys_equal_torchs_on_every_code(
    device: torch.device, generator: torch.Generator
) -> None:
    layout = KeyLayout(64, 128, "mxfp4")
    pool = torch.randint(0, 256, (layout.plane_bytes,), dtype=torch.uint8, generator=generator)
    pool[:256] = torch.arange(256)
    values, scales = pool[: 64 * 64].view(64, 64), pool[64 * 64 :].view(64, 4)
    scales.clamp_(max=252)  # above, 6 * scale overflows
    scales[5], scales[6, 3] = 255, 255
    scales[63] = 255  # of the masked key: not read
    out, sound = torch.zeros(64, 128, device=device), torch.zeros(64, device=device)
    load_all_mxfp4[(1,)](pool.to(device), out, sound, N=64, DIMS=128)
    want = decode_keys(values, scales, layout)
    want[-1] = 0.0
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)
    broken = scales.eq(255).any(1)
    broken[-1] = False
    assert torch.equal(sound.cpu().isnan(), broken)
    assert sound.cpu()[~broken].eq(1).all()


def test_e8m0_codes_decode_as_torchs(device: torch.device) -> None:
    out = torch.zeros(256, device=device)
    all_e8m0[(1,)](out)
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)
