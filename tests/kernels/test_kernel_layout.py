"""The byte formats against oracles that share no code with them: fractions, nearest codes, plain bytes."""

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import (
    KeyLayout,
    KeyPool,
    RowLayout,
    RowPool,
    decode_keys,
    decode_rows,
    encode_keys,
    encode_rows,
    hadamard,
    load_rows,
    store_rows,
)
from forepage_kernels.mxfp4 import simulate_mxfp4


def e4m3_value(code: int) -> Fraction:
    """Value of a finite, non-negative e4m3 code."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 2**9)
    return Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


E4M3 = [e4m3_value(code) for code in range(127)]


def nearest_e4m3(x: Fraction) -> int:
    """Code nearest to x, ties to the even code."""
    best = min(range(127), key=lambda code: (abs(E4M3[code] - abs(x)), code % 2))
    return best | (0x80 if x < 0 else 0)


def scale_exponent(amax: float) -> int:
    """Smallest e with max(amax, 1e-4) <= 448 * 2^e, by exact arithmetic."""
    floor = Fraction(struct.unpack("f", struct.pack("f", 1e-4))[0])
    value = max(Fraction(amax), floor)
    exponent = -40
    while value > 448 * Fraction(2) ** exponent:
        exponent += 1
    return exponent


def float32(x: float) -> float:
    """x rounded to fp32."""
    return float(torch.tensor(x, dtype=torch.float32))


@dataclass(frozen=True)
class SizeCase:
    """A layout and the bytes the format's definition gives it."""

    id: str
    layout: RowLayout | KeyLayout
    value_bytes: int
    scale_bytes: int


SIZE_CASES = [
    SizeCase("flash-row", RowLayout(64, 448, 64, "fp8"), 576, 8),
    SizeCase("seeded-row", RowLayout(64, 64, 64, "fp8"), 192, 8),
    SizeCase("half-group-row", RowLayout(2, 96, 32, "fp8"), 160, 8),
    SizeCase("nine-groups-row", RowLayout(2, 576, 64, "fp8"), 704, 16),
    SizeCase("fp32-row", RowLayout(64, 448, 64, "fp32"), 2048, 0),
    SizeCase("key", KeyLayout(64, 128, "fp8"), 128, 4),
    SizeCase("narrow-key", KeyLayout(64, 64, "fp8"), 64, 4),
    SizeCase("mxfp4-key", KeyLayout(64, 128, "mxfp4"), 64, 4),
    SizeCase("narrow-mxfp4-key", KeyLayout(64, 32, "mxfp4"), 16, 1),
    SizeCase("fp32-key", KeyLayout(64, 128, "fp32"), 512, 0),
]


@pytest.mark.parametrize("case", SIZE_CASES, ids=lambda case: case.id)
def test_layout_sizes_follow_the_format(case: SizeCase) -> None:
    assert case.layout.value_bytes == case.value_bytes
    assert case.layout.scale_bytes == case.scale_bytes
    assert case.layout.plane_bytes == case.layout.entries * (case.value_bytes + case.scale_bytes)


def test_row_bytes_match_a_hand_encoded_row() -> None:
    layout = RowLayout(1, 128, 4, "fp8")
    x = torch.zeros(1, 132)
    x[0, 0], x[0, 1], x[0, 63] = 448.0, -1.0, 2**-9  # scale 1: code 0x7E, 0xB8, the smallest subnormal
    x[0, 64], x[0, 65] = 449.0, 448.0  # scale 2: 224.5 -> 224 = 0x76, 224
    x[0, 128:] = torch.tensor([1.0, -2.0, 1.00390625, 0.0])  # 1 + 2^-8 ties to even: 1.0
    values, scales = encode_rows(x, layout)
    nope = bytearray(128)
    nope[0], nope[1], nope[63], nope[64], nope[65] = 0x7E, 0xB8, 0x01, 0x76, 0x76
    rope = struct.pack("<4H", 0x3F80, 0xC000, 0x3F80, 0)
    assert bytes(values[0].tolist()) == bytes(nope) + rope
    assert scales[0].tolist() == [127, 128, 0, 0, 0, 0, 0, 0]


def test_key_bytes_match_a_hand_encoded_key() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 5] = 3.5, -0.0078125  # 3.5 = 448 / 128: scale 2^-7 exactly
    values, scales = encode_keys(x, KeyLayout(1, 64, "fp8"))
    expected = bytearray(64)
    expected[0], expected[5] = 0x7E, 0xB8
    assert bytes(values[0].tolist()) == bytes(expected)
    assert bytes(scales[0].tolist()) == struct.pack("<f", 2**-7)


def test_mxfp4_bytes_match_a_hand_encoded_key() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1], x[0, 2] = 6.0, -0.5, 2.5  # scale 1: codes 7, 9 and, tied between 4 and 5, 4
    x[0, 31] = -0.25  # tied between 0 and 1: the even one, with its sign
    x[0, 32], x[0, 33] = 0.375, -0.1875  # 0.375 = 6 / 16: scale 2^-4, codes 7 and 13
    values, scales = encode_keys(x, KeyLayout(1, 64, "mxfp4"))
    expected = bytearray(32)
    expected[0], expected[1], expected[15], expected[16] = 0x97, 0x04, 0x80, 0xD7
    assert bytes(values[0].tolist()) == bytes(expected)
    assert scales[0].tolist() == [127, 123]


E2M1 = [Fraction(half, 2) for half in (0, 1, 2, 3, 4, 6, 8, 12)]


def nearest_e2m1(x: Fraction) -> int:
    """Code nearest to |x|, ties to the even code."""
    return min(range(8), key=lambda code: (abs(E2M1[code] - abs(x)), code % 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8), st.integers(-20, 3))
def test_mxfp4_codes_are_the_nearest_e2m1(small: list[float], shift: int) -> None:
    x = torch.tensor([small + [0.0] * 24], dtype=torch.float32) * 2.0**shift
    values, scales = encode_keys(x, KeyLayout(1, 32, "mxfp4"))
    exponent = int(scales[0, 0]) - 127
    amax = Fraction(float(x.abs().max()))
    assert amax <= 6 * Fraction(2) ** exponent
    assert amax > 3 * Fraction(2) ** exponent or exponent == -126
    for pair, byte in enumerate(values[0].tolist()):
        for code, value in ((byte & 15, x[0, 2 * pair]), (byte >> 4, x[0, 2 * pair + 1])):
            assert code & 7 == nearest_e2m1(Fraction(float(value)) / Fraction(2) ** exponent)
            assert (code > 7) == bool(value.signbit())


@pytest.mark.parametrize("exponent", [-126, -30, 0, 20, 125])
def test_mxfp4_scale_steps_exactly_past_6_times_a_power_of_two(exponent: int) -> None:
    x = torch.zeros(3, 32)
    x[:, 7] = torch.tensor(6.0) * 2.0**exponent
    x[1] *= -1
    x[2, 7] = torch.nextafter(x[2, 7], torch.tensor(math.inf))
    _, scales = encode_keys(x, KeyLayout(1, 32, "mxfp4"))
    assert scales[:, 0].tolist() == [exponent + 127, exponent + 127, exponent + 128]


def test_every_mxfp4_code_and_scale_decodes_to_its_value() -> None:
    layout = KeyLayout(1, 32, "mxfp4")
    codes = torch.arange(16, dtype=torch.uint8).view(8, 2)
    values = (codes[:, 0] | codes[:, 1] << 4).repeat(255, 2)  # [255, 16]
    decoded = decode_keys(values, torch.arange(255, dtype=torch.uint8).unsqueeze(1), layout)
    for scale, row in enumerate(decoded.double()):
        wanted = [
            (-1 if code > 7 else 1) * float(E2M1[code & 7]) * 2.0 ** (scale - 127) for code in range(16)
        ]
        wanted = [math.copysign(min(abs(value), math.inf), value) for value in wanted]
        assert row.tolist() == torch.tensor(wanted * 2).double().tolist(), scale


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_mxfp4_group_that_is_not_finite_decodes_to_nan(bad: float) -> None:
    layout = KeyLayout(1, 64, "mxfp4")
    x = torch.ones(1, 64)
    x[0, 40] = bad
    values, scales = encode_keys(x, layout)
    assert scales[0].tolist() == [125, 255]
    assert not values[0, 16:].any()
    decoded = decode_keys(values, scales, layout)
    assert decoded[0, :32].eq(1).all()
    assert decoded[0, 32:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 32), (63, 128), (2, 3, 64)], ids=str)
def test_mxfp4_simulation_is_encoding_and_decoding(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator) * 7
    layout = KeyLayout(1, shape[-1], "mxfp4")
    rounded = simulate_mxfp4(x)
    assert torch.equal(rounded, decode_keys(*encode_keys(x.view(-1, shape[-1]), layout), layout).view(shape))
    assert torch.equal(simulate_mxfp4(rounded), rounded)


BOUNDARIES = [448.0 * 2.0**e for e in (-30, -22, -21, -8, -1, 0, 1, 20)]


@pytest.mark.parametrize("amax", BOUNDARIES)
def test_scale_steps_exactly_past_448_times_a_power_of_two(amax: float) -> None:
    x = torch.zeros(3, 64)
    x[:, 7] = torch.tensor([amax, -amax, 0.0])
    x[2, 7] = torch.nextafter(torch.tensor(amax), torch.tensor(math.inf))
    _, scales = encode_rows(x.clone(), RowLayout(1, 64, 0, "fp8"))
    expected = [scale_exponent(float(row.abs().max())) + 127 for row in x]
    assert scales[:, 0].tolist() == expected


def test_zero_row_takes_the_floor_scale_and_decodes_to_zero() -> None:
    layout = RowLayout(1, 64, 64, "fp8")
    values, scales = encode_rows(torch.zeros(1, 128), layout)
    assert scales[0, 0] == scale_exponent(0.0) + 127
    assert torch.equal(decode_rows(values, scales, layout), torch.zeros(1, 128))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8), st.integers(-20, 3))
def test_key_codes_are_the_nearest_e4m3(small: list[float], shift: int) -> None:
    x = torch.tensor([small], dtype=torch.float32) * 2.0**shift
    values, scales = encode_keys(x, KeyLayout(1, 8, "fp8"))
    exponent = scale_exponent(float(x.abs().max()))
    assert bytes(scales[0].tolist()) == struct.pack("<f", 2.0**exponent)
    for code, value in zip(values[0].tolist(), x[0].tolist(), strict=True):
        wanted = nearest_e4m3(Fraction(value) / Fraction(2) ** exponent)
        assert code & 0x7F == wanted & 0x7F
        assert code == wanted or value == 0.0 or code & 0x7F == 0


def test_every_finite_e4m3_code_decodes_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    padded = torch.cat((finite, finite.new_zeros(2))).view(2, 128)
    scales = torch.tensor([1.0, 0.5]).view(2, 1).view(torch.uint8)
    decoded = decode_keys(padded, scales, KeyLayout(1, 128, "fp8"))
    for row, scale in ((0, 1), (1, Fraction(1, 2))):
        for code, value in zip(padded[row].tolist(), decoded[row].tolist(), strict=True):
            sign = -1 if code & 0x80 else 1
            assert Fraction(value) == sign * e4m3_value(code & 0x7F) * scale


@pytest.mark.parametrize("layout", [RowLayout(4, 448, 64, "fp8"), RowLayout(4, 96, 32, "fp8")], ids=str)
def test_decoded_rows_encode_to_the_same_values(layout: RowLayout, generator: torch.Generator) -> None:
    x = torch.randn(63, layout.head_dim, generator=generator) * 10
    once = decode_rows(*encode_rows(x, layout), layout)
    again = decode_rows(*encode_rows(once, layout), layout)
    assert torch.equal(once, again)
    assert (once - x).abs().max() <= x.abs().max() * 2**-4


@pytest.mark.parametrize("dims", [1, 2, 64, 128])
def test_hadamard_is_the_sylvester_matrix(dims: int, generator: torch.Generator) -> None:
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(dims)] for i in range(dims)]
    matrix = torch.tensor(signs, dtype=torch.float64) / math.sqrt(dims)
    x = torch.randn(3, 5, dims, generator=generator)
    torch.testing.assert_close(hadamard(x), (x.double() @ matrix).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


def expected_span(pool: RowPool | KeyPool, slot: int) -> bytes:
    """Values then scales of a slot, addressed by hand in the pool's flat bytes."""
    layout = pool.layout
    flat = bytes(pool.bytes.flatten().tolist())
    plane = (slot // layout.entries) * pool.bytes.shape[1] + pool.layer_offset
    value = plane + (slot % layout.entries) * layout.value_bytes
    scale = plane + layout.entries * layout.value_bytes + (slot % layout.entries) * layout.scale_bytes
    return flat[value : value + layout.value_bytes] + flat[scale : scale + layout.scale_bytes]


POOLS: list[tuple[type[RowPool] | type[KeyPool], RowLayout | KeyLayout]] = [
    (RowPool, RowLayout(3, 64, 64, "fp8")),
    (RowPool, RowLayout(3, 64, 64, "fp32")),
    (KeyPool, KeyLayout(2, 64, "fp8")),
    (KeyPool, KeyLayout(2, 64, "mxfp4")),
    (KeyPool, KeyLayout(3, 32, "mxfp4")),
    (KeyPool, KeyLayout(2, 64, "fp32")),
]


@pytest.mark.parametrize(("kind", "layout"), POOLS, ids=str)
def test_stored_rows_lie_where_the_plane_formula_says(
    kind: type[RowPool] | type[KeyPool], layout: RowLayout | KeyLayout, generator: torch.Generator
) -> None:
    block_bytes = -(-layout.plane_bytes // 8) * 8 + 48
    pool = kind(torch.full((4, block_bytes), 0xFF, dtype=torch.uint8), 16, layout)  # type: ignore[arg-type]
    x = torch.randn(3, layout.dims, generator=generator)
    slots = torch.tensor([layout.entries * 4 - 1, -1, layout.entries])
    store_rows(pool, slots, x)
    for index in (0, 2):
        encoded = (
            encode_rows(x[index : index + 1], layout)
            if isinstance(layout, RowLayout)
            else (encode_keys(x[index : index + 1], layout))
        )
        expected = bytes(torch.cat(encoded, dim=1)[0].tolist())
        assert expected_span(pool, int(slots[index])) == expected
    written = 2 * (layout.value_bytes + layout.scale_bytes)
    changed = int((pool.bytes != 0xFF).sum())
    assert changed <= written
    loaded = load_rows(pool, torch.stack((slots, torch.full((3,), -7))))  # [2, 3, dims]
    assert torch.equal(loaded[0, 1], torch.zeros(layout.dims))
    assert torch.equal(loaded[1], torch.zeros(3, layout.dims))
    assert not loaded.isnan().any()
    rtol, atol = (0.25, 0.5) if layout.format == "mxfp4" else (2**-4, 2**-8)
    torch.testing.assert_close(loaded[0, 0], x[0], rtol=rtol, atol=atol)


def test_load_of_no_slots_is_empty_even_from_an_empty_pool() -> None:
    layout = RowLayout(2, 64, 64, "fp8")
    pool = RowPool(torch.empty(0, 400, dtype=torch.uint8), 0, layout)
    assert load_rows(pool, torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 128)
    assert torch.equal(load_rows(pool, torch.tensor([-1, -(2**63)])), torch.zeros(2, 128))


def test_slot_past_the_pool_raises() -> None:
    layout = RowLayout(2, 64, 64, "fp8")
    pool = RowPool(torch.zeros(2, 400, dtype=torch.uint8), 0, layout)
    with pytest.raises(IndexError):
        load_rows(pool, torch.tensor([4]))
    with pytest.raises(IndexError):
        store_rows(pool, torch.tensor([2**40]), torch.zeros(1, 128))


@pytest.mark.parametrize(
    ("block_bytes", "layer_offset"),
    [(399, 0), (400, 8), (400, -8), (404, 4), (404, 0)],
    ids=["too-small", "offset-past-end", "negative", "offset-unaligned", "block-unaligned"],
)
def test_pool_that_breaks_its_plane_is_refused(block_bytes: int, layer_offset: int) -> None:
    layout = RowLayout(2, 64, 64, "fp8")
    with pytest.raises(ShapeError):
        RowPool(torch.zeros(2, block_bytes, dtype=torch.uint8), layer_offset, layout)


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ShapeError):
        RowLayout(64, 60, 64, "fp8")
    with pytest.raises(ShapeError):
        RowLayout(0, 64, 64, "fp8")
    with pytest.raises(ShapeError):
        KeyLayout(64, 96, "fp8")
    with pytest.raises(ShapeError):
        KeyLayout(64, 96, "mxfp4")
    with pytest.raises(ShapeError):
        KeyLayout(64, 16, "mxfp4")
    with pytest.raises(ShapeError):
        hadamard(torch.zeros(3))


def test_transposed_pool_is_refused() -> None:
    with pytest.raises(ShapeError):
        RowPool(torch.zeros(400, 400, dtype=torch.uint8).T, 0, RowLayout(2, 64, 64, "fp8"))
