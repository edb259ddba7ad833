"""resolve_rows: a loop over entries, the torch reference and the Triton kernel agree exactly."""

import pytest
import torch
from torch import Tensor

from forepage_kernels.errors import ShapeError
from forepage_kernels.resolve_rows import kernel, reference, resolve_rows

PLANE_OFFSET, ENTRIES = 37_440, 4
Parts = tuple[Tensor, ...]


def make(batch: int, count: int, blocks: int, staging_blocks: int, seed: int) -> dict[str, Tensor]:
    """A third of the list is padding, blocks may be absent, without a record, and staging blocks missing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(-max(1, high // 3), high, shape, generator=generator)

    selected = torch.full((batch, count), -1)
    for row in range(batch):
        picked = torch.randperm(blocks * ENTRIES, generator=generator)[: 2 * count // 3].sort().values
        selected[row, : picked.numel()] = picked
    return {
        "selected": selected,
        "row_table": draw(50, batch, blocks).clamp(min=-1).int(),
        "staging": draw(90, batch, staging_blocks).clamp(min=-1),
        "records": draw(1000, batch, blocks).clamp(min=-1) * 4096,
    }


def by_hand(given: dict[str, Tensor]) -> Parts:
    selected = given["selected"].tolist()
    batch, count = given["selected"].shape
    slots = torch.full((batch, count), -1)
    pull, pulled, unserved = slots.clone(), torch.zeros(batch).long(), torch.zeros(batch).long()
    for row in range(batch):
        for place, entry in enumerate(selected[row]):
            if entry < 0:
                continue
            block, staged = entry // ENTRIES, -1
            if place // ENTRIES < given["staging"].shape[1]:
                staged = int(given["staging"][row, place // ENTRIES])
            if (block_id := int(given["row_table"][row, block])) >= 0:
                slots[row, place] = block_id * ENTRIES + entry % ENTRIES
            elif staged >= 0 and given["records"][row, block] >= 0:
                slots[row, place] = pull[row, place] = staged * ENTRIES + place % ENTRIES
                pulled[row] += 1
            else:
                unserved[row] += 1
    return slots, pull.flatten(), pulled, unserved


CASES = {
    "small": (2, 7, 5, 2),
    "one": (1, 1, 1, 1),
    "odd": (3, 63, 40, 16),
    "nothing-to-pull-to": (2, 9, 6, 0),
    "no-rows": (0, 4, 3, 1),
    "more-than-a-tile": (2, 1500, 700, 375),
}


@pytest.mark.parametrize("sizes", list(CASES.values()), ids=list(CASES))
@pytest.mark.parametrize("which", ["reference", "kernel"])
def test_rows_are_where_a_loop_finds_them(
    which: str, sizes: tuple[int, int, int, int], device: torch.device
) -> None:
    given = make(*sizes, seed=sum(sizes))
    where = torch.device("cpu") if which == "reference" else device
    moved = {name: tensor.to(where) for name, tensor in given.items()}
    resolve = reference.resolve_rows if which == "reference" else kernel.resolve_rows
    selected, table = moved.pop("selected"), moved.pop("row_table")
    got = resolve(selected, table, plane_offset=PLANE_OFFSET, block_entries=ENTRIES, **moved)
    slots, pull, offsets, entries, pulled, unserved = (part.cpu() for part in got)
    for ours, theirs in zip((slots, pull, pulled, unserved), by_hand(given), strict=True):
        assert torch.equal(ours, theirs)
    at = pull >= 0
    wanted = given["selected"].flatten()[at]
    row = torch.arange(sizes[0]).repeat_interleave(sizes[1])[at]
    assert torch.equal(offsets[at], given["records"][row, wanted // ENTRIES] + PLANE_OFFSET)
    assert torch.equal(entries[at], wanted % ENTRIES)


def test_wrong_arguments_are_named() -> None:
    given = make(2, 7, 5, 2, seed=0)
    for name in ("row_table", "staging", "records"):
        wrong = given | {name: given[name].float()}
        with pytest.raises(ShapeError, match=name):
            resolve_rows(**wrong, plane_offset=0, block_entries=ENTRIES)
