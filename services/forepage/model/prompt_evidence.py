"""Where a prompt's last tokens looked: blocks that held evidence for them, while nothing was paged yet.

A question's own words select what they name all over the history. That selection is there after prefill
for nothing, and says before the first step which blocks the answer will need. What an answer reads often
lies behind or before what was matched, so an entry speaks for its surroundings too.
"""

import torch
from torch import Tensor

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.model.indexer import IndexerTap

SURROUNDINGS = 16
"""Entries (64 tokens) before and behind an entry that it speaks for."""


def prompt_evidence(tap: IndexerTap, num_tokens: int, num_blocks: int) -> Tensor:
    """Of each block the largest share of the softmax, f32 [num_blocks], that an entry in or near it held.

    In one layer, over the last `num_tokens` of the tap's tokens; shares below evidence's count as 0.
    """
    selected, scores = tap.selected[-num_tokens:], tap.scores[-num_tokens:]
    shares = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # no entry at all: NaN
    shares = shares.masked_fill((shares < EVIDENCE_PROBABILITY) | (selected < 0), 0.0).flatten()
    best = torch.zeros(num_blocks, device=shares.device)
    for distance in (-SURROUNDINGS, SURROUNDINGS):
        blocks = (selected.flatten() + distance).clamp(0, num_blocks * BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
        best.scatter_reduce_(0, blocks, shares, "amax")
    return best
