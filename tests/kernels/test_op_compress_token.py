"""compress_token: tokens taken one by one give the entries of whole windows; kernel and reference agree."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.compress_token import Window, compress_token, kernel, reference
from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool, load_rows

EPS = 1e-6
CODE_FLIPS = 1e-3
"""Share of codes that may be one step off: fp32 sums in another order land on the other side of a tie."""


@dataclass(frozen=True)
class Case:
    """`rows` sequences through `steps` tokens each from `start` on."""

    id: str
    layout: RowLayout | KeyLayout
    ratio: int
    overlaps: bool
    rows: int
    start: int = 0
    steps: int = 9
    rope_dims: int = 32
    gpu: bool = False


ROWS = RowLayout(4, 64, 32, "fp8")
FLASH = RowLayout(64, 448, 64, "fp8")
CASES = [
    Case("c4-rows", ROWS, 4, True, 2),
    Case("c4-rows-later", ROWS, 4, True, 3, start=11, steps=6),
    Case("c4-keys", KeyLayout(4, 64, "fp8"), 4, True, 2),
    Case("c4-mxfp4-keys", KeyLayout(4, 64, "mxfp4"), 4, True, 2),
    Case("plain-window", RowLayout(2, 64, 32, "fp8"), 16, False, 2, start=12, steps=6),
    Case("no-rows", ROWS, 4, True, 0, steps=1),
    Case("flash-c4-rows", FLASH, 4, True, 65, start=1021, steps=9, rope_dims=64, gpu=True),
    Case("flash-c4-keys", KeyLayout(64, 128, "fp8"), 4, True, 65, steps=9, rope_dims=64, gpu=True),
    Case(
        "flash-c128", RowLayout(2, 448, 64, "fp8"), 128, False, 33, start=126, steps=4, rope_dims=64, gpu=True
    ),
]


@dataclass
class Setup:
    """Pools and state on one device; every unwritten byte is NaN."""

    pool: RowPool | KeyPool
    state: Tensor
    how: Window
    slots: Tensor


def make(case: Case, device: torch.device) -> Setup:
    generator = torch.Generator().manual_seed(1)
    layout = case.layout
    channels = layout.dims * (2 if case.overlaps else 1)
    ring = case.ratio * (2 if case.overlaps else 1)
    plane = -(-layout.plane_bytes // 8) * 8
    data = torch.full((2 * case.rows + 2, plane), 0xFF, dtype=torch.uint8, device=device)
    pool = RowPool(data, 0, layout) if isinstance(layout, RowLayout) else KeyPool(data, 0, layout)
    # One layer of two: the state of a slot is contiguous, that of a layer is not.
    state = torch.full((case.rows + 1, 2, 2, ring, channels), float("nan"), device=device)[:, 1]
    how = Window(
        case.ratio,
        torch.randn(case.ratio, channels, generator=generator).to(device),
        torch.rand(layout.dims, generator=generator).to(device),
        case.rope_dims,
        EPS,
    )
    return Setup(pool, state, how, torch.arange(case.rows, device=device).flip(0) + 1)


def tokens(case: Case) -> Tensor:
    """What the projections of every token from 0 on give: f32 [end, rows, 2 * C]."""
    channels = case.layout.dims * (2 if case.overlaps else 1)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(case.start + case.steps, case.rows, 2 * channels, generator=generator) * 2


def angles(case: Case, positions: Tensor) -> tuple[Tensor, Tensor]:
    turn = positions[:, None].float() * torch.linspace(1.0, 0.01, case.rope_dims // 2)
    return turn.cos(), turn.sin()


def target_of(case: Case, row: int, position: int) -> int:
    """Entries of a sequence go round in its own two blocks; none where no window closes."""
    if (position + 1) % case.ratio:
        return -1 if row % 2 else -(2**63)
    return 2 * row * case.layout.entries + position // case.ratio % (2 * case.layout.entries)


def warm_up_from(case: Case) -> int:
    """Where a run begins: later than at 0 to save time, and then nothing from before `start` is stored."""
    return 0 if case.start < 64 else max(0, case.start - 3 * case.ratio)


def run(case: Case, setup: Setup, take: Callable[..., None]) -> None:
    device = setup.state.device
    projected = tokens(case).to(device)
    for position in range(warm_up_from(case), case.start + case.steps):
        positions = torch.full((case.rows,), position)
        cos, sin = angles(case, positions - positions % case.ratio)
        stored = warm_up_from(case) == 0 or position >= case.start
        places = [target_of(case, row, position) if stored else -1 for row in range(case.rows)]
        targets = torch.tensor(places, dtype=torch.int64)
        take(
            projected[position].contiguous(),
            setup.state,
            setup.slots,
            positions.to(device),
            setup.how,
            pool=setup.pool,
            targets=targets.to(device),
            cos=cos.to(device),
            sin=sin.to(device),
        )


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.gpu and case.rows], ids=lambda case: case.id
)
def test_reference_equals_whole_windows(case: Case) -> None:
    """Each entry against compress_quantize over the tokens it pools, picked by hand."""
    setup, whole = make(case, torch.device("cpu")), make(case, torch.device("cpu"))
    run(case, setup, reference.compress_token)
    given, dims = tokens(case), case.layout.dims
    channels = given.shape[2] // 2
    kv, gate = given[..., :channels], given[..., channels:].clone()
    for position in range(given.shape[0]):
        gate[position] += setup.how.position_bias[position % case.ratio]
    for row in range(case.rows):
        for end in range(case.ratio, given.shape[0] + 1, case.ratio):
            own = slice(end - case.ratio, end)
            parts = [(kv[own, row, -dims:], gate[own, row, -dims:])]
            if case.overlaps and end > case.ratio:
                before = slice(end - 2 * case.ratio, end - case.ratio)
                parts.insert(0, (kv[before, row, :dims], gate[before, row, :dims]))
            window, gates = (torch.cat(pair).unsqueeze(0) for pair in zip(*parts, strict=True))
            cos, sin = angles(case, torch.tensor([end - case.ratio]))
            target = torch.tensor([target_of(case, row, end - 1)])
            compress_quantize(
                window,
                gates,
                whole.how.norm_weight,
                cos,
                sin,
                whole.pool,
                target,
                rope_dims=case.rope_dims,
                eps=EPS,
            )
    same = (setup.pool.bytes == whole.pool.bytes).float().mean()
    assert same >= 1 - CODE_FLIPS


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_equals_reference(case: Case, device: torch.device) -> None:
    ours, theirs = make(case, device), make(case, torch.device("cpu"))
    run(case, ours, kernel.compress_token)
    run(case, theirs, reference.compress_token)
    torch.testing.assert_close(ours.state.cpu(), theirs.state, rtol=0, atol=0, equal_nan=True)
    touched = (theirs.pool.bytes != 0xFF).any(1)
    assert torch.equal((ours.pool.bytes.cpu() != 0xFF).any(1), touched)
    same = (ours.pool.bytes.cpu() == theirs.pool.bytes).float().mean()
    assert same >= 1 - CODE_FLIPS
    slots = torch.tensor(
        [
            target_of(case, row, end)
            for row in range(case.rows)
            for end in range(case.start, case.start + case.steps)
        ]
    )
    slots = slots[slots >= 0]
    if slots.numel():
        decoded = load_rows(ours.pool, slots.to(device)).cpu(), load_rows(theirs.pool, slots)
        assert not decoded[0].isnan().any()
        torch.testing.assert_close(*decoded, rtol=0.14, atol=0.2)  # a code that flipped is one step off


def test_wrong_arguments_are_named() -> None:
    case = CASES[0]
    setup = make(case, torch.device("cpu"))

    def call(**changes: Tensor) -> None:
        cos, sin = angles(case, torch.zeros(2, dtype=torch.int64))
        given = {
            "projected": tokens(case)[0],
            "state": setup.state,
            "slots": setup.slots,
            "positions": torch.zeros(2, dtype=torch.int64),
            "targets": torch.full((2,), -1),
            "cos": cos,
            "sin": sin,
        } | changes
        compress_token(how=setup.how, pool=setup.pool, **given)

    call()
    for name in ("projected", "state", "slots", "positions", "targets", "cos"):
        with pytest.raises(ShapeError, match=name):
            call(**{name: torch.zeros(2, 3, dtype=torch.float64)})
