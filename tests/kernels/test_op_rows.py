"""row_norm and row_turn: definitions in fp64, the torch reference and the Triton kernel agree."""

from collections.abc import Callable

import pytest
import torch

from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import hadamard as layout_hadamard
from forepage_kernels.row_norm import kernel as norm_kernel
from forepage_kernels.row_norm import reference as norm_reference
from forepage_kernels.row_norm import rms_norm, unit_rms
from forepage_kernels.row_turn import hadamard, turn_pairs
from forepage_kernels.row_turn import kernel as turn_kernel
from forepage_kernels.row_turn import reference as turn_reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(3, 64), (1, 129), (5, 2, 96), (2, 3, 4, 32), (0, 64), (40, 7, 63)]
GPU_SHAPES = [(257, 4096), (64, 64, 512), (3, 7168)]


def shapes(*, even: bool = False) -> list[object]:
    """`even`: rounded down to what has pairs."""
    cut = [(*shape[:-1], shape[-1] // 2 * 2 if even else shape[-1]) for shape in (*SHAPES, *GPU_SHAPES)]
    return [
        pytest.param(shape, id="x".join(map(str, shape)), marks=[pytest.mark.gpu] * (shape in GPU_SHAPES))
        for shape in cut
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", shapes())
def test_norms(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Callable[..., None],
) -> None:
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator)
    wide = x.double()
    unit = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_close(norm_reference.unit_rms(x, EPS), unit.float())
    assert_close(norm_reference.rms_norm(x, weight, EPS), (unit * weight.double()).to(dtype))
    there, weight_there = x.to(device), weight.to(device)
    assert_close(norm_kernel.rms_norm(there, None, EPS, torch.float32), norm_reference.unit_rms(x, EPS))
    assert_close(
        norm_kernel.rms_norm(there, weight_there, EPS, dtype), norm_reference.rms_norm(x, weight, EPS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", shapes(even=True))
@pytest.mark.parametrize("inverse", [False, True], ids=["there", "back"])
def test_turns(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inverse: bool,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Callable[..., None],
) -> None:
    dims = shape[-1] // 4 * 2
    x = torch.randn(shape, generator=generator).to(dtype)
    angle = torch.rand(shape[0], dims // 2, generator=generator) * 6
    angle = angle.view(shape[0], *(1 for _ in shape[1:-1]), dims // 2)
    cos, sin = angle.cos(), angle.sin()
    tail = x[..., shape[-1] - dims :].double().unflatten(-1, (dims // 2, 2))
    pairs = torch.view_as_complex(tail.contiguous())
    turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle).to(torch.complex128)
    turned = torch.view_as_real(pairs * turn).flatten(-2).to(dtype)
    expected = torch.cat((x[..., : shape[-1] - dims], turned), dim=-1)
    assert_close(turn_reference.turn_pairs(x, cos, sin, inverse=inverse), expected)
    got = turn_kernel.turn_pairs(x.to(device), cos.to(device), sin.to(device), inverse=inverse)
    assert_close(got, expected)


def test_one_row_of_angles_turns_all(device: torch.device, generator: torch.Generator) -> None:
    x, angle = torch.randn(5, 3, 64, generator=generator), torch.rand(16, generator=generator)
    together = turn_kernel.turn_pairs(x.to(device), angle.cos().to(device), angle.sin().to(device)).cpu()
    torch.testing.assert_close(
        together, turn_reference.turn_pairs(x, angle.cos(), angle.sin()), atol=2e-6, rtol=0
    )
    assert torch.equal(
        turn_pairs(x, angle.cos(), angle.sin()), turn_reference.turn_pairs(x, angle.cos(), angle.sin())
    )


@pytest.mark.parametrize("dims", [2, 64, 128])
def test_hadamard_is_the_byte_formats_own_bit_for_bit(
    dims: int, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(5, 3, dims, generator=generator)
    assert torch.equal(turn_kernel.hadamard(x.to(device)).cpu(), layout_hadamard(x))
    assert torch.equal(hadamard(x), layout_hadamard(x))


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(3, 2, 64)
    with pytest.raises(ShapeError, match="weight"):
        rms_norm(x, torch.zeros(63), EPS)
    with pytest.raises(ShapeError, match="x"):
        unit_rms(x.long(), EPS)
    with pytest.raises(ShapeError, match="x"):
        turn_pairs(x, torch.zeros(3, 1, 33), torch.zeros(3, 1, 33))
    with pytest.raises(ShapeError, match="cos"):
        turn_pairs(x, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    with pytest.raises(ShapeError, match="no power of two"):
        hadamard(torch.zeros(2, 3))
