"""Golden labels against a brute-force reading of the rule, with the released off-by-one gone."""

import math

import pytest
import torch

from forepage.errors import RequestError
from forepage.training.indexer.golden import golden_entries


def brute_force(selected: list[int], scores: list[float], mass: float) -> list[tuple[int, float]]:
    """By falling share: while less than `mass` stands before, and all that alone hold 1 %."""
    pairs = [(entry, score) for entry, score in zip(selected, scores, strict=True) if entry >= 0]
    total = math.fsum(math.exp(score) for _, score in pairs)
    ranked = sorted(((math.exp(score) / total, entry) for entry, score in pairs), key=lambda p: (-p[0], p[1]))
    kept, before = [], 0.0
    for share, entry in ranked:
        if before < mass - 1e-7 or share >= 0.01:
            kept.append((entry, share))
        before += share
    return kept


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_golden_entries_are_the_brute_force_ones(mass: float, spread: float) -> None:
    draw = torch.Generator().manual_seed(int(spread * 10))
    rows, k = 17, 200
    selected = torch.stack([torch.randperm(900, generator=draw)[:k].sort().values for _ in range(rows)])
    scores = torch.randn(rows, k, generator=draw) * spread
    short = 30
    selected[3, short:], scores[3, short:] = -1, float("-inf")
    golden = golden_entries(selected, scores, mass=mass)
    start = 0
    for row in range(rows):
        wanted = brute_force(selected[row].tolist(), scores[row].double().tolist(), mass)
        end = start + int(golden.counts[row])
        assert golden.entries[start:end].tolist() == [entry for entry, _ in wanted]
        torch.testing.assert_close(
            golden.masses[start:end].double(),
            torch.tensor([share for _, share in wanted], dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
        )
        start = end
    assert start == len(golden.entries)


def test_an_entry_that_alone_exceeds_the_mass_stands_alone() -> None:
    # The released code forced the first entry in and then counted the first one over: it kept two.
    scores = torch.tensor([[9.0, 0.0, 1.0]])
    golden = golden_entries(torch.tensor([[4, 7, 8]]), scores, mass=0.6)
    assert golden.entries.tolist() == [4]


def test_the_entry_that_crosses_the_mass_is_kept() -> None:
    scores = torch.tensor([[0.4, 0.4, 0.2]]).log()
    golden = golden_entries(torch.tensor([[1, 2, 3]]), scores, mass=0.6)
    assert golden.entries[golden.in_mass_set(0.6)].tolist() == [1, 2]


def test_equal_scores_go_to_the_lower_entry() -> None:
    golden = golden_entries(torch.tensor([[5, 6, 7, 8]]), torch.zeros(1, 4), mass=0.5)
    assert golden.entries[golden.in_mass_set(0.5)].tolist() == [5, 6]


def test_a_row_that_sees_nothing_has_no_golden_entry() -> None:
    golden = golden_entries(torch.full((2, 3), -1), torch.full((2, 3), float("-inf")), mass=0.6)
    assert golden.counts.tolist() == [0, 0]
    assert len(golden.entries) == 0


def test_a_smaller_mass_set_is_read_off_a_larger_one() -> None:
    draw = torch.Generator().manual_seed(2)
    selected = torch.arange(300).expand(9, -1).contiguous()
    scores = torch.randn(9, 300, generator=draw)
    large = golden_entries(selected, scores, mass=0.8)
    small = golden_entries(selected, scores, mass=0.4)
    kept = large.in_mass_set(0.4)
    of_small = small.in_mass_set(0.4)
    assert large.entries[kept].tolist() == small.entries[of_small].tolist()
    assert large.row_ids()[kept].tolist() == small.row_ids()[of_small].tolist()


@pytest.mark.parametrize("mass", [0.0, 1.5])
def test_a_mass_outside_0_to_1_is_refused(mass: float) -> None:
    with pytest.raises(RequestError, match="mass"):
        golden_entries(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), mass=mass)
