"""Plain torch native_indexer: decode the visible resident keys, one matrix product a sequence."""

import torch
from torch import Tensor

from forepage_kernels.layout import KeyPool, load_rows


def native_indexer(
    q: Tensor, weights: Tensor, pool: KeyPool, *, block_table: Tensor, visible: Tensor
) -> Tensor:
    """See the package."""
    entries = pool.layout.entries
    batch, num_blocks = block_table.shape
    scores = q.new_full((batch, num_blocks * entries), float("-inf"))
    offset = torch.arange(entries, device=q.device)
    asked = q.bfloat16().float() if pool.layout.rotated else q
    for b in range(batch):
        block_ids = block_table[b].to(torch.int64)
        slots = (block_ids.unsqueeze(1) * entries + offset).flatten()  # [M * entries]
        index = torch.arange(slots.shape[0], device=q.device)
        readable = (slots >= 0) & (index < visible[b])
        keys = load_rows(pool, slots[readable])  # [n, D]
        scores[b, readable] = torch.relu(keys @ asked[b].T) @ weights[b]
    return scores
