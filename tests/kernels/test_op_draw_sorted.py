"""draw_sorted: a loop over columns, the torch reference and the Triton kernel pick the same."""

import pytest
import torch
from torch import Tensor

from forepage_kernels.draw_sorted import draw_sorted, kernel, reference
from forepage_kernels.errors import ShapeError

LIMITS = [
    (1e9, 1.0, 0.0),
    (3.0, 1.0, 0.0),
    (1e9, 0.5, 0.0),
    (1e9, 1.0, 0.3),
    (40.0, 0.9, 0.01),
    (1.0, 1e-9, 1.0),
]


def make(columns: int, spread: float, seed: int) -> dict[str, Tensor]:
    """A row for each of LIMITS and each of some targets; the last tenth of the columns is forbidden."""
    generator = torch.Generator().manual_seed(seed)
    targets = [0.0, 0.2, 0.5, 0.999, 1 - 2**-53]
    logits = torch.randn(len(LIMITS) * len(targets), columns, generator=generator).double() * spread
    logits[:, columns - columns // 10 :] = -torch.inf
    probs = logits.softmax(-1).sort(-1, descending=True).values
    limits = torch.tensor([limit for limit in LIMITS for _ in targets], dtype=torch.float64)
    return {
        "probs": probs,
        "top_k": limits[:, 0],
        "top_p": limits[:, 1],
        "min_p": limits[:, 2],
        "target": torch.tensor(targets * len(LIMITS), dtype=torch.float64),
    }


def by_hand(given: dict[str, Tensor], row: int) -> int:
    probs = given["probs"][row].tolist()
    kept, mass = [probs[0]], probs[0]
    for column, p in enumerate(probs[1:], 1):
        is_kept = column < given["top_k"][row] and mass < given["top_p"][row]
        if not is_kept or p < given["min_p"][row] * probs[0] or p == 0:
            break
        kept.append(p)
        mass += p
    goal, passed = float(given["target"][row]) * sum(kept), 0.0
    for column, p in enumerate(kept):
        passed += p
        if passed > goal:
            return column
    return len(kept) - 1


@pytest.mark.parametrize("which", ["reference", "kernel"])
@pytest.mark.parametrize(("columns", "spread"), [(1, 1.0), (50, 1.0), (1023, 3.0), (2600, 0.1), (2600, 4.0)])
def test_the_column_is_the_one_a_loop_finds(
    which: str, columns: int, spread: float, device: torch.device
) -> None:
    given = make(columns, spread, seed=columns)
    where = device if which == "kernel" else torch.device("cpu")
    draw = kernel.draw_sorted if which == "kernel" else reference.draw_sorted
    moved = {name: tensor.to(where) for name, tensor in given.items()}
    got = draw(moved.pop("probs"), **moved).tolist()
    wanted = [by_hand(given, row) for row in range(len(got))]
    # Sums in another order may end on the other side of the goal: then the neighbour is as good.
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(got, wanted, strict=True))
    assert sum(ours == theirs for ours, theirs in zip(got, wanted, strict=True)) >= len(got) - 1


def test_a_row_does_not_depend_on_those_beside_it(device: torch.device) -> None:
    given = {name: tensor.to(device) for name, tensor in make(2600, 1.0, seed=7).items()}
    together = kernel.draw_sorted(**given)
    for row in range(together.numel()):
        alone = {name: tensor[row : row + 1].contiguous() for name, tensor in given.items()}
        assert kernel.draw_sorted(**alone).item() == together[row].item()


def test_wrong_arguments_are_named() -> None:
    given = make(5, 1.0, seed=0)
    for name in given:
        with pytest.raises(ShapeError, match=name):
            draw_sorted(**(given | {name: given[name].float()}))
