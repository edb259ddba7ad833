"""Plain torch select_topk: torch.topk finds the last value taken, ties at it go to the lower index.

torch.topk alone breaks ties arbitrarily; a stable sort of the whole row is ten times slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage_kernels.layout import ABSENT


def select_topk(logits: Tensor, k: int) -> Tensor:
    """See the package."""
    num_rows, num_entries = logits.shape
    taken = min(k, num_entries)
    if taken == 0:
        return torch.full((num_rows, k), ABSENT, dtype=torch.int64, device=logits.device)
    ranked = torch.where(logits > float("-inf"), logits, float("-inf"))  # NaN -> -inf
    last = ranked.topk(taken, dim=1).values[:, -1:]  # [B, 1]
    above = ranked > last
    tied = (ranked == last) & (ranked > float("-inf"))
    is_taken = above | (tied & (tied.cumsum(1) <= taken - above.sum(1, keepdim=True)))
    entries = torch.arange(num_entries, device=logits.device)
    indices = torch.where(is_taken, entries, num_entries).topk(taken, dim=1, largest=False).values
    indices = indices.sort(dim=1).values  # [B, taken], the sentinel last
    return F.pad(torch.where(indices < num_entries, indices, ABSENT), (0, k - taken), value=ABSENT)
