"""unpack_rows: stored rows and keys, decoded exactly, wherever they lie."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool, load_rows, store_rows
from forepage_kernels.unpack_rows import kernel, unpack_rows

NanOutputs = Callable[[], AbstractContextManager[None]]
Pool = RowPool | KeyPool
ROWS_STORED = 150

LAYOUTS: dict[str, RowLayout | KeyLayout] = {
    "flash-row": RowLayout(64, 448, 64, "fp8"),
    "tiny-row": RowLayout(64, 64, 64, "fp8"),
    "odd-row": RowLayout(3, 256, 44, "fp8"),
    "fp8-key": KeyLayout(64, 128, "fp8"),
    "mxfp4-key": KeyLayout(64, 128, "mxfp4"),
}


def make(layout: RowLayout | KeyLayout, generator: torch.Generator) -> tuple[Pool, Tensor]:
    """A pool whose every other byte is NaN, and the slots that hold something, shuffled."""
    block_bytes = -(-layout.plane_bytes // 8) * 8 + 24
    num_blocks = 2 * -(-ROWS_STORED // layout.entries)
    stored = torch.full((num_blocks, block_bytes), 0xFF, dtype=torch.uint8)
    pool: Pool = RowPool(stored, 16, layout) if isinstance(layout, RowLayout) else KeyPool(stored, 16, layout)
    slots = torch.randperm(num_blocks * layout.entries, generator=generator)[:ROWS_STORED]
    store_rows(pool, slots, torch.randn(ROWS_STORED, layout.dims, generator=generator))
    return pool, slots


def on(pool: Pool, device: torch.device) -> Pool:
    """A copy of the pool there."""
    moved = pool.bytes.to(device)
    if isinstance(pool, RowPool):
        return RowPool(moved, pool.layer_offset, pool.layout)
    return KeyPool(moved, pool.layer_offset, pool.layout)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_kernel_equals_what_is_stored_bit_for_bit(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    nan_outputs: NanOutputs,
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter's bf16 is wrong")
    pool, slots = make(LAYOUTS[name], generator)
    slots[::7] = torch.tensor([-1, -(2**63), 2**62])[torch.arange(len(slots[::7])) % 3]
    with nan_outputs():
        got = kernel.unpack_rows(on(pool, device), slots.to(device), dtype).cpu()
    want = load_rows(pool, torch.where(slots < 2**32, slots, -1))
    assert got.dtype == dtype
    assert torch.equal(got.float(), want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_holds_every_stored_value(name: str, generator: torch.Generator) -> None:
    pool, slots = make(LAYOUTS[name], generator)
    assert torch.equal(unpack_rows(pool, slots, torch.bfloat16).float(), load_rows(pool, slots))


def test_nothing_to_unpack_gives_no_rows(device: torch.device, generator: torch.Generator) -> None:
    pool, slots = make(LAYOUTS["tiny-row"], generator)
    got = kernel.unpack_rows(on(pool, device), slots[:0].to(device), torch.float32)
    assert got.shape == (0, 128)


def test_fp32_values_are_not_squeezed_into_bf16() -> None:
    pool, slots = make(RowLayout(64, 64, 64, "fp32"), torch.Generator().manual_seed(1))
    assert torch.equal(unpack_rows(pool, slots, torch.float32), load_rows(pool, slots))
    with pytest.raises(ShapeError, match="dtype"):
        unpack_rows(pool, slots, torch.bfloat16)
