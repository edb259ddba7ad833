"""Plain torch select_topk: a stable sort, because torch.topk breaks ties arbitrarily."""

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage_kernels.layout import ABSENT


def select_topk(logits: Tensor, k: int) -> Tensor:
    """See the package."""
    taken = min(k, logits.shape[1])
    ranked = torch.where(logits > float("-inf"), logits, float("-inf"))  # NaN -> -inf
    values, indices = ranked.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :taken], indices[:, :taken]
    last = logits.shape[1]
    indices = torch.where(values > float("-inf"), indices, last).sort(dim=1).values
    return F.pad(torch.where(indices < last, indices, ABSENT), (0, k - taken), value=ABSENT)
