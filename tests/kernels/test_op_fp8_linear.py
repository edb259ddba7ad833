"""fp8_linear: a product with squares of scaled FP8 values, with activations as they are or rounded to FP8."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError
from forepage_kernels.fp8_linear import Fp8Weight, fp8_linear, kernel, reference
from forepage_kernels.fp8_linear.reference import simulate_fp8

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]
E4M3_STD = 100.0
"""What evenly drawn codes spread by."""


@dataclass(frozen=True)
class Case:
    """x [tokens, groups, inputs]; the weight's parts are of `part_rows` rows, all of them where not given."""

    id: str
    tokens: int
    outputs: int
    inputs: int
    groups: int = 1
    part_rows: int = 0
    gpu: bool = False


SMALL = [
    Case("one-token", 1, 64, 128),
    Case("odd", 5, 33, 130),
    Case("groups", 3, 96, 160, groups=3),
    Case("parts", 7, 200, 256, part_rows=100),
    Case("columns-shared-out", 2, 70, 1200),
    Case("two-tiles-of-tokens", 130, 65, 64),
    Case("no-token", 0, 64, 128),
]
SHAPES = {
    "wq_a": (1024, 4096, 1),
    "wq_b": (32768, 1024, 1),
    "wkv": (512, 4096, 1),
    "wo_a": (1024, 4096, 8),
    "wo_b": (4096, 8192, 1),
    "shared_w13": (4096, 4096, 1),
}
LARGE = [
    Case(
        f"{name}-{tokens}", tokens, outputs, inputs, groups, part_rows=2048 * (name == "shared_w13"), gpu=True
    )
    for name, (outputs, inputs, groups) in SHAPES.items()
    for tokens in (1, 8, 64, 256, 2048)
]


def make(case: Case, generator: torch.Generator) -> tuple[Tensor, Fp8Weight]:
    """Every finite code occurs, neighbouring scales differ, outputs are of about unit scale."""
    rows = case.groups * case.outputs
    part = case.part_rows or rows
    magnitude = torch.randint(0x7F, (rows, case.inputs), dtype=torch.uint8, generator=generator)
    sign = torch.randint(2, (rows, case.inputs), dtype=torch.uint8, generator=generator) << 7
    squares = torch.arange(rows // part * -(-part // 128)).unsqueeze(1) + torch.arange(-(-case.inputs // 128))
    middle = 127 + round(math.log2(case.inputs**-0.5 / E4M3_STD))
    scales = (squares % 3 + middle - 1).to(torch.uint8)
    weight = Fp8Weight((magnitude | sign).view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), part)
    return torch.randn(case.tokens, case.groups, case.inputs, generator=generator), weight


def on(device: torch.device, weight: Fp8Weight) -> Fp8Weight:
    return Fp8Weight(weight.values.to(device), weight.scales.to(device), weight.part_rows)


def plain(weight: Fp8Weight) -> Tensor:
    """f64, square by square."""
    out = weight.values.float().double()
    per_part = -(-weight.part_rows // 128)
    codes = weight.scales.view(torch.uint8).double()
    for part in range(len(out) // weight.part_rows):
        rows = out[part * weight.part_rows : (part + 1) * weight.part_rows]
        for i in range(per_part):
            for j in range(codes.shape[1]):
                square = rows[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
                square *= 2.0 ** (float(codes[part * per_part + i, j]) - 127)
    return out


def rounded(x: Tensor) -> Tensor:
    """f64: 128 columns at a time, scaled by a power of two until they fit e4m3."""
    out = x.double().clone()
    for tile in out.split(128, dim=-1):
        amax = tile.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        tile.copy_((tile / scale).float().to(torch.float8_e4m3fn).double() * scale)
    return out


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_reference_equals_fp64(
    case: Case, quantise: bool, generator: torch.Generator, assert_close: Check
) -> None:
    x, weight = make(case, generator)
    wide = rounded(x) if quantise else x.double()
    matrix = plain(weight).view(case.groups, case.outputs, case.inputs)
    assert_close(fp8_linear(x, weight, quantise=quantise), torch.einsum("ngi,goi->ngo", wide, matrix).float())


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_kernel_equals_the_reference(
    case: Case,
    quantise: bool,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    """In fp32 under the interpreter, in bf16 on a GPU."""
    x, weight = make(case, generator)
    x = x.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    weight = on(device, weight)
    with nan_outputs():
        got = kernel.fp8_linear(x, weight, quantise=quantise)
    assert_close(got, reference.fp8_linear(x, weight, quantise=quantise))


@pytest.mark.gpu
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_kernel_equals_the_reference_at_real_sizes(
    case: Case,
    quantise: bool,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    x, weight = make(case, generator)
    x, weight = x.to(device, torch.bfloat16), on(device, weight)
    with nan_outputs():
        got = fp8_linear(x, weight, quantise=quantise)
    assert_close(got, reference.fp8_linear(x, weight, quantise=quantise))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_row_has_the_same_bits_in_any_batch(
    name: str, device: torch.device, generator: torch.Generator
) -> None:
    outputs, inputs, groups = SHAPES[name]
    x, weight = make(Case(name, 1500, outputs, inputs, groups), generator)
    x, weight = x.to(device, torch.bfloat16), on(device, weight)
    few, many = fp8_linear(x[:256], weight), fp8_linear(x, weight)
    for first, count in ((0, 1), (3, 16), (100, 17), (60, 64), (1, 200)):
        assert torch.equal(fp8_linear(x[first : first + count], weight), few[first : first + count]), count
    assert torch.equal(fp8_linear(x[1000:1300], weight), many[1000:1300])


def test_rounded_activations_are_as_near_as_three_bits_allow(generator: torch.Generator) -> None:
    x = torch.randn(50, 300, generator=generator)
    error = (simulate_fp8(x) - x).abs() / x.abs()
    # A value far below the largest of its 128 is an e4m3 subnormal; of the others none is off by more.
    assert error[x.abs() > 2**-6].max() <= 2**-4
    assert (error > 2**-9).any()


def test_wrong_shapes_are_refused(generator: torch.Generator) -> None:
    x, weight = make(SMALL[3], generator)
    with pytest.raises(ShapeError, match="x: shape"):
        fp8_linear(x[:, 0], weight)
    with pytest.raises(ShapeError, match="3 groups do not divide 200 rows"):
        fp8_linear(x.expand(-1, 3, -1).contiguous(), weight)
    with pytest.raises(ShapeError, match="scales: shape"):
        fp8_linear(x, Fp8Weight(weight.values, weight.scales, part_rows=200 // 8))
    with pytest.raises(ShapeError, match="in parts of 3 rows"):
        fp8_linear(x, Fp8Weight(weight.values, weight.scales, part_rows=3))
