"""mix_streams: a plain loop over tokens and streams, the torch reference and the Triton kernel agree."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError
from forepage_kernels.mix_streams import (
    MixParameters,
    collapse_streams,
    expand_streams,
    kernel,
    project_streams,
    projection,
    reference,
)

EPS = 1e-6
PARTS = 9


@dataclass(frozen=True)
class Case:
    """`rows` tokens of `streams` streams of `dims`."""

    id: str
    rows: int
    streams: int
    dims: int
    dtype: torch.dtype = torch.float32
    iterations: int = 20
    normed: bool = True
    gpu: bool = False


CASES = [
    Case("one-token", 1, 4, 64),
    Case("odd-dims", 3, 4, 129),
    Case("two-streams-one-iteration", 2, 2, 63, iterations=1),
    Case("plain", 2, 4, 64, normed=False),
    Case("no-tokens", 0, 4, 64),
    Case("bf16", 5, 4, 96, torch.bfloat16),
    Case("flash-decode", 64, 4, 4096, torch.bfloat16, gpu=True),
    Case("pro-one", 1, 4, 7168, torch.bfloat16, gpu=True),
    Case("flash-prefill", 1025, 4, 4096, torch.bfloat16, gpu=True),
    Case("tiny-fp32", 257, 4, 256, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of both ops."""

    streams: Tensor
    projected: Tensor
    norm_weight: Tensor | None
    how: MixParameters
    output: Tensor


def make(case: Case, generator: torch.Generator) -> Call:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = (2 + case.streams) * case.streams
    how = MixParameters(rand(width), rand(3).abs() + 0.5, EPS, EPS, case.iterations)
    return Call(
        streams=(rand(case.rows, case.streams, case.dims) * 2).to(case.dtype),
        projected=rand(PARTS, case.rows, width),
        norm_weight=rand(case.dims) if case.normed else None,
        how=how,
        output=rand(case.rows, case.dims).to(case.dtype),
    )


def moved(call: Call, device: torch.device) -> Call:
    how = call.how
    return Call(
        call.streams.to(device),
        call.projected.to(device),
        None if call.norm_weight is None else call.norm_weight.to(device),
        MixParameters(how.base.to(device), how.scale.to(device), how.eps, how.norm_eps, how.iterations),
        call.output.to(device),
    )


def by_hand(call: Call, token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token in fp64, as the paper writes it: input, post, comb, and the streams after it."""
    streams, how = call.streams[token].double(), call.how
    count = streams.shape[0]
    mixed = call.projected[:, token].double().sum(0) / (streams.square().mean() + how.norm_eps).sqrt()
    scale, base = how.scale.double(), how.base.double()
    pre = torch.sigmoid(mixed[:count] * scale[0] + base[:count]) + how.eps
    post = 2 * torch.sigmoid(mixed[count : 2 * count] * scale[1] + base[count : 2 * count])
    logits = (mixed[2 * count :] * scale[2] + base[2 * count :]).view(count, count)
    comb = torch.softmax(logits, dim=1) + how.eps
    for turn in range(2 * how.iterations - 1):
        comb = comb / (comb.sum(turn % 2, keepdim=True) + how.eps)
    x = (pre @ streams).to(call.streams.dtype).double()
    if call.norm_weight is not None:
        x = x / (x.square().mean() + how.norm_eps).sqrt() * call.norm_weight.double()
    rows = [
        post[k] * call.output[token].double() + sum(comb[j, k] * streams[j] for j in range(count))
        for k in range(count)
    ]
    return x, post, comb, torch.stack(rows)


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], assert_close: Callable[..., None]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", [case for case in CASES if not case.gpu], ids=lambda case: case.id)
def test_reference_follows_the_equations(
    case: Case, generator: torch.Generator, assert_close: Callable[..., None]
) -> None:
    call = make(case, generator)
    x, post, comb = reference.collapse_streams(call.streams, call.projected, call.norm_weight, call.how)
    expanded = reference.expand_streams(call.output, call.streams, post, comb)
    for token in range(case.rows):
        want = by_hand(call, token)
        dtypes = (case.dtype, torch.float32, torch.float32, case.dtype)
        rounded = tuple(part.to(dtype) for part, dtype in zip(want, dtypes, strict=True))
        check((x[token], post[token], comb[token], expanded[token]), rounded, assert_close)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_equals_reference(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    nan_outputs: Callable[..., object],
    assert_close: Callable[..., None],
) -> None:
    call = make(case, generator)
    ours = moved(call, device)
    with nan_outputs():  # type: ignore[attr-defined]
        got = kernel.collapse_streams(ours.streams, ours.projected, ours.norm_weight, ours.how)
        expanded = kernel.expand_streams(ours.output, ours.streams, got[1], got[2])
    want = reference.collapse_streams(call.streams, call.projected, call.norm_weight, call.how)
    check(got, want, assert_close)
    check((expanded,), (reference.expand_streams(call.output, call.streams, want[1], want[2]),), assert_close)


PROJECTED = [
    Case("one", 1, 4, 128, torch.bfloat16),
    Case("odd", 17, 4, 129, torch.bfloat16),
    Case("two-streams", 3, 2, 513, torch.bfloat16),
    Case("none", 0, 4, 64, torch.bfloat16),
    Case("flash", 65, 4, 4096, torch.bfloat16, gpu=True),
    Case("pro", 3, 4, 7168, torch.bfloat16, gpu=True),
    Case("prefill", 4097, 4, 4096, torch.bfloat16, gpu=True),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in PROJECTED]
)
def test_projection_is_an_fp32_product_whatever_the_batch(
    case: Case, device: torch.device, generator: torch.Generator, nan_outputs: Callable[..., object]
) -> None:
    """Off by what sums in steps of 16 columns, three products each, may be; alone a token has its bits."""
    columns = case.streams * case.dims
    streams = make(case, generator).streams.to(device)
    fn = (
        torch.randn((2 + case.streams) * case.streams, columns, generator=generator).to(device) / columns**0.5
    )
    with nan_outputs():  # type: ignore[attr-defined]
        parts = projection.project_streams(streams, fn)
    assert parts.shape == (-(-columns // projection.PART_COLUMNS), case.rows, fn.shape[0])
    wanted = streams.flatten(1).double() @ fn.double().T
    error = (parts.double().sum(0) - wanted).square().mean().sqrt()
    assert (
        not case.rows or error <= 3 * projection.PART_COLUMNS / 16 * 2.0**-23 * wanted.square().mean().sqrt()
    )
    for token in range(0, case.rows, 97):
        alone = projection.project_streams(streams[token : token + 1], fn)
        assert torch.equal(alone[:, 0], parts[:, token])
    in_torch = reference.project_streams(streams, fn).sum(0)
    torch.testing.assert_close(in_torch.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_token_does_not_depend_on_those_beside_it(device: torch.device, generator: torch.Generator) -> None:
    call = moved(make(Case("rows", 5, 4, 100), generator), device)
    together = kernel.collapse_streams(call.streams, call.projected, call.norm_weight, call.how)
    for token in range(5):
        one = slice(token, token + 1)
        projected = call.projected[:, one].contiguous()
        alone = kernel.collapse_streams(call.streams[one], projected, call.norm_weight, call.how)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs[one])


def test_wrong_arguments_are_named(generator: torch.Generator) -> None:
    call = make(Case("bad", 2, 4, 64), generator)
    with pytest.raises(ShapeError, match="power of two"):
        collapse_streams(call.streams[:, :3].contiguous(), call.projected, None, call.how)
    with pytest.raises(ShapeError, match="projected"):
        collapse_streams(call.streams, call.projected[:, :1].contiguous(), None, call.how)
    with pytest.raises(ShapeError, match="fn"):
        project_streams(call.streams, torch.zeros(24, 4 * 63))
    with pytest.raises(ShapeError, match="output"):
        expand_streams(call.output[:, :3], call.streams, torch.zeros(2, 4), torch.zeros(2, 4, 4))
