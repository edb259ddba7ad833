"""moe: MXFP4 experts, sorted tokens, one sum a token; other ranks' experts and idle experts cost nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError
from forepage_kernels.moe import Fp4Experts, kernel, moe, reference
from forepage_kernels.moe.sorting import NO_EXPERT, sort_pairs

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_STD = 2.9
"""What evenly drawn codes spread by."""
LIMIT = 1.5
"""Clamps often."""


@dataclass(frozen=True)
class Case:
    """A rank's `held` experts from `first` on, of `total`; `busy` limits which ones tokens choose."""

    id: str
    tokens: int
    choices: int
    size: int
    width: int
    held: int
    first: int = 0
    total: int = 0
    busy: int | None = None
    gpu: bool = False

    @property
    def num_experts(self) -> int:
        return self.total or self.held


SMALL = [
    Case("one-token", 1, 1, 32, 32, 1),
    Case("odd", 9, 3, 96, 160, 5),
    Case("a-rank", 7, 4, 32, 64, held=3, first=2, total=9),
    Case("nothing-here", 3, 2, 32, 64, held=2, first=6, total=8, busy=4),
    Case("two-tiles-of-one-expert", 40, 1, 64, 96, 4, busy=1),
    Case("no-token", 0, 2, 32, 64, 4),
]
FLASH = [Case(f"flash-{n}", n, 6, 2048, 4096, held=32, gpu=True) for n in (1, 8, 64, 256, 2048)]
LARGE = [
    *FLASH,
    Case("flash-rank", 300, 6, 2048, 4096, held=32, first=64, total=256, gpu=True),
    Case("pro", 33, 6, 3072, 7168, held=48, total=384, gpu=True),
    Case("eight-experts", 8192, 2, 256, 512, held=8, gpu=True),
    Case("idle-experts", 129, 6, 2048, 4096, held=32, busy=7, gpu=True),
    Case("odd-large", 63, 3, 1056, 544, held=17, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    experts: Fp4Experts

    def to(self, device: torch.device, dtype: torch.dtype) -> "Call":
        """The same there, activations in that dtype."""
        parts = ("w13", "w13_scales", "w2", "w2_scales")
        experts = replace(self.experts, **{part: getattr(self.experts, part).to(device) for part in parts})
        return Call(self.x.to(device, dtype), self.chosen.to(device), self.weights.to(device), experts)


def make(case: Case, generator: torch.Generator) -> Call:
    """Every code occurs, neighbouring scales differ, outputs are of about unit scale."""

    def values(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def scales(rows: int, columns: int) -> Tensor:
        middle = 127 + round(float(torch.tensor(columns**-0.5 / E2M1_STD).log2()))
        codes = torch.arange(rows).unsqueeze(1) + torch.arange(columns // 32)
        codes = codes + torch.arange(case.held).view(-1, 1, 1)
        return (codes % 3 + middle - 1).to(torch.uint8)

    size, width, held = case.size, case.width, case.held
    experts = Fp4Experts(
        w13=values(held, 2 * size, width // 2),
        w13_scales=scales(2 * size, width),
        w2=values(held, width, size // 2),
        w2_scales=scales(width, size),
        first=case.first,
        total=case.num_experts,
    )
    busy = case.busy or case.num_experts
    chosen = torch.rand(case.tokens, busy, generator=generator).argsort(dim=1)[:, : case.choices]
    weights = torch.rand(case.tokens, case.choices, generator=generator)
    return Call(torch.randn(case.tokens, width, generator=generator), chosen.contiguous(), weights, experts)


def run(op: Callable[..., Tensor], call: Call) -> Tensor:
    """Call an implementation."""
    return op(call.x, call.chosen, call.weights, call.experts, limit=LIMIT)


def plain(values: Tensor, scales: Tensor) -> Tensor:
    """u8 [n, d / 2] and codes u8 [n, d / 32] -> f64 [n, d], by a table."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    codes = torch.stack((values % 16, values // 16), dim=-1).flatten(1)  # [n, d]
    return table[codes.long()] * torch.exp2(scales.double() - 127).repeat_interleave(32, dim=1)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_reference_equals_a_loop_over_tokens(
    case: Case, generator: torch.Generator, assert_close: Check
) -> None:
    call = make(case, generator)
    want = torch.zeros(case.tokens, case.width, dtype=torch.float64)
    for token in range(case.tokens):
        for choice in range(case.choices):
            expert = int(call.chosen[token, choice]) - case.first
            if not 0 <= expert < case.held:
                continue
            w13 = plain(call.experts.w13[expert], call.experts.w13_scales[expert])
            w2 = plain(call.experts.w2[expert], call.experts.w2_scales[expert])
            gate_up = w13 @ call.x[token].double()
            gate, up = gate_up[: case.size], gate_up[case.size :]
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            want[token] += call.weights[token, choice] * (w2 @ (gate / (1 + torch.exp(-gate)) * up))
    assert_close(run(moe, call), want.float())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_kernel_equals_the_reference(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    """In fp32 under the interpreter, in bf16 on a GPU; what is not written is NaN and must not be read."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    call = make(case, generator).to(device, dtype)
    with nan_outputs():
        got = run(kernel.moe, call)
    assert_close(got.to(dtype), run(reference.moe, call).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_kernel_equals_the_reference_at_real_sizes(
    case: Case, device: torch.device, generator: torch.Generator, nan_outputs: NanOutputs
) -> None:
    call = make(case, generator).to(device, torch.bfloat16)
    with nan_outputs():
        got = run(moe, call)
    want = run(reference.moe, call)
    # A hidden value on the border of two bf16 numbers may round either way: 2^-8 of one of `size` addends.
    error = (got - want).abs() / want.square().mean().sqrt()
    assert error.square().mean().sqrt() < 2**-9
    assert error.max() < 2**-4


@pytest.mark.gpu
def test_token_has_the_same_bits_in_any_batch(device: torch.device, generator: torch.Generator) -> None:
    call = make(FLASH[-1], generator).to(device, torch.bfloat16)
    whole = run(moe, call)
    for first, count in ((0, 1), (5, 2), (100, 7), (200, 33), (17, 100), (1000, 256), (600, 700)):
        part = slice(first, first + count)
        few = Call(call.x[part], call.chosen[part], call.weights[part], call.experts)
        assert torch.equal(run(moe, few), whole[part]), count


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_call_can_be_captured(tokens: int, device: torch.device, generator: torch.Generator) -> None:
    """One graph serves every routing: how many tokens an expert gets is nowhere on the host."""
    case = Case("captured", tokens, 6, 2048, 4096, held=32)
    call, other = (make(case, generator).to(device, torch.bfloat16) for _ in range(2))
    other = replace(other, experts=call.experts)
    want = run(moe, call), run(moe, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(moe, call)
    graph.replay()
    assert torch.equal(got, want[0])
    call.x.copy_(other.x)
    call.chosen.copy_(other.chosen)
    call.weights.copy_(other.weights)
    graph.replay()
    assert torch.equal(got, want[1])


@pytest.mark.parametrize(
    ("tokens", "choices", "held", "first", "total", "tile"),
    [
        (1, 1, 1, 0, 1, 16),
        (33, 2, 5, 0, 5, 16),
        (70, 3, 4, 3, 9, 32),
        pytest.param(1000, 6, 32, 32, 256, 16, marks=pytest.mark.gpu),
        pytest.param(8192, 6, 384, 0, 384, 128, marks=pytest.mark.gpu),
        pytest.param(8192, 8, 8, 0, 8, 64, marks=pytest.mark.gpu),
    ],
)
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(
    tokens: int,
    choices: int,
    held: int,
    first: int,
    total: int,
    tile: int,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    chosen = torch.rand(tokens, total, generator=generator).argsort(dim=1)[:, :choices].contiguous()
    pairs = sort_pairs(chosen.to(device), first=first, num_experts=held, tile_tokens=tile)
    local = chosen.flatten() - first
    by_expert = local.argsort(stable=True)
    ours = by_expert[(local[by_expert] >= 0) & (local[by_expert] < held)]
    assert torch.equal(pairs.order.cpu()[: len(ours)].long(), ours)
    want, begin = [], 0
    for expert in range(held):
        count = int((local == expert).sum())
        want += [[expert, begin + at, min(tile, count - at)] for at in range(0, count, tile)]
        begin += count
    tiles = pairs.tiles.cpu()
    assert tiles[: len(want)].tolist() == want
    assert (tiles[len(want) :, 0] == NO_EXPERT).all()


def test_sizes_that_cut_a_scale_are_refused(generator: torch.Generator) -> None:
    call = make(SMALL[1], generator)
    experts = replace(call.experts, w2=call.experts.w2[:, :-2], w13=call.experts.w13[..., :-1])
    with pytest.raises(ShapeError, match="x: shape"):
        run(moe, replace(call, experts=experts))
    with pytest.raises(ShapeError, match="multiples of 32"):
        run(moe, replace(call, experts=experts, x=call.x[:, :-2].contiguous()))
    experts = replace(call.experts, w13_scales=call.experts.w2_scales)
    with pytest.raises(ShapeError, match="w13_scales: shape"):
        run(moe, replace(call, experts=experts))
