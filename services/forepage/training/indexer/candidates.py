"""What a step learns from: every wanted candidate, the model's own worst mistakes, and a few at random.

All plans of a text share one list, so what one wants is a negative of the others. At block granularity
candidates are blocks, else entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """`ids` i64 [C] ascending; `mined`: how many of them are there because they scored too high."""

    ids: Tensor
    num_mined: int


def choose_candidates(
    wanted: Tensor,
    valid: Tensor,
    scores: Tensor | None,
    *,
    hard: int,
    random: int,
    generator: torch.Generator,
) -> Candidates:
    """wanted, valid bool [B, n]; scores f32 [B, n] of the present model, None while nothing is mined.

    A hard negative of a plan is a valid candidate that it does not want and scores highest.
    """
    num = wanted.shape[1]
    taken = (wanted & valid).any(0)
    before = int(taken.sum())
    mined = 0
    if scores is not None and hard:
        wrong = scores.masked_fill(wanted | ~valid, float("-inf"))
        best = wrong.topk(min(hard, num), dim=1)
        taken = taken | _mask(best.indices[best.values > float("-inf")], num)
        mined = int(taken.sum()) - before
    if random:
        drawn = torch.randint(num, (random,), generator=generator, device=taken.device)
        taken = taken | (_mask(drawn, num) & valid.any(0))
    return Candidates(taken.nonzero().squeeze(1), mined)


def _mask(ids: Tensor, num: int) -> Tensor:
    return torch.zeros(num, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)
