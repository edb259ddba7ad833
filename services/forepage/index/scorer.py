"""Lookahead scores of a whole history: for each block, how likely one of its entries will be needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forepage.coldpool.records import SlotRef
from forepage.index.key_store import MappedKeys
from forepage.kv.geometry import KvGeometry
from forepage.model.kv_pools import key_layout
from forepage.model.memory_indexer import MemoryIndexer
from forepage_kernels.memory_indexer import memory_indexer

CHUNK_BLOCKS = 128
"""Blocks a CPU scores at once: 8,192 keys, 4 MB a layer when decoded to fp32, which its cache holds."""


@dataclass(frozen=True)
class BlockScores:
    """One value a block: the highest probability among its entries and the target layers."""

    scores: tuple[float, ...]  # 0 where no entry is above the threshold, or the block wasn't readable
    num_scored: int  # blocks that were readable before and after


class BlockScorer(Protocol):
    """Says how likely each block is needed: `Scorer`, or a load test that replays a trace."""

    def score_blocks(
        self,
        keys: MappedKeys,
        blocks: Sequence[SlotRef],
        *,
        hidden: Tensor,
        position: int,
        threshold: float,
        check: Callable[[], None],
    ) -> BlockScores: ...


class Scorer:
    """Scores blocks straight from the arena with the memory indexer; used from several threads."""

    def __init__(self, indexer: MemoryIndexer, geometry: KvGeometry, device: torch.device) -> None:
        """`device` is where the indexer's weights are."""
        self._indexer = indexer
        self._layout = key_layout(geometry)
        self._device = device

    def warm_up(self) -> None:
        """Have a GPU compile what the first question would wait for."""
        with torch.inference_mode():
            layers, layout = len(self._indexer.target_layers), self._layout
            q, weights = self._indexer.queries(
                torch.zeros(layers, self._indexer.hidden_size, device=self._device), 0
            )
            memory_indexer(
                q.unsqueeze(0),
                weights.unsqueeze(0),
                torch.zeros(layout.plane_bytes, dtype=torch.uint8, device=self._device),
                layout=layout,
                plane_offsets=torch.zeros(1, 1, layers, dtype=torch.int64, device=self._device),
                threshold=0.0,
            )

    def score_blocks(
        self,
        keys: MappedKeys,
        blocks: Sequence[SlotRef],
        *,
        hidden: Tensor,
        position: int,
        threshold: float,
        check: Callable[[], None],
    ) -> BlockScores:
        """Score every block against the token's attention inputs; `check` may raise between chunks.

        Shapes: hidden f32 [target layers, hidden]. A block whose slot changed hands, before or while its
        keys were read, scores 0. Damaged keys (NaN) are never above a threshold.
        Raises: RequestError for hidden states or a position the model refuses.
        """
        q, weights = self._indexer.queries(hidden.to(self._device), position)
        before = keys.readable(blocks)  # bool [n]
        offsets = keys.plane_offsets(blocks, before, self._indexer.target_layers)  # [n, L]
        best: list[Tensor] = []
        step = CHUNK_BLOCKS if self._device.type == "cpu" else max(1, len(blocks))
        for start in range(0, len(blocks), step):
            check()
            chunk = offsets[start : start + step].to(self._device)  # [m, L]
            entries = memory_indexer(
                q.unsqueeze(0),
                weights.unsqueeze(0),
                keys.payloads,
                layout=self._layout,
                plane_offsets=chunk.unsqueeze(0),
                threshold=threshold,
            )  # [1, m * entries]
            best.append(entries.view(-1, self._layout.entries).amax(dim=1).cpu())  # [m]; the keys were read
        scored = before & keys.readable(blocks)
        scores = torch.cat(best) * scored if best else torch.zeros(0)
        return BlockScores(tuple(scores.tolist()), int(scored.sum()))
