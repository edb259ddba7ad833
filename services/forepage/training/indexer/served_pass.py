"""Runs a text with its answers once through the served model and takes what the memory indexer learns from.

Teacher-forced: the answers are known, so one prefill of the whole chat gives every answer token's hidden
states, keys and selections. It is `Transformer.prefill`, not the training network: what is labelled are the
selections of the model that will be served, over stored keys, with sparse attention and FP8 rows. The
difference that stays is decode's kernels in place of prefill's, and answers that are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forepage.errors import RequestError
from forepage.kv.geometry import C4_RATIO, KvGeometry
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk, key_layout
from forepage.model.transformer import StepOutput, Transformer
from forepage.training.indexer.features import Features, TextId
from forepage.training.indexer.golden import Golden, golden_entries

CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Text:
    """A chat with answers: tokens i64 [n]; for each token, which answer the *next* one belongs to, or -1."""

    id: TextId
    tokens: NDArray[np.int64]
    answers: NDArray[np.int32]


class ServedPass:
    """A model with pools for one sequence of at most `max_tokens`."""

    def __init__(
        self, model: Transformer, *, target_layers: Sequence[int], max_tokens: int, mass: float
    ) -> None:
        """`target_layers` are c4 indices, those of the model's `target_layers`. Raises: RequestError."""
        spec, geometry = model.spec, model.geometry
        if model.target_layers != tuple(spec.c4_layers[idx] for idx in target_layers):
            raise RequestError(f"the model taps layers {model.target_layers}, not those of {target_layers}")
        self._model = model
        self._layers = tuple(target_layers)
        self._mass = mass
        blocks = geometry.num_blocks(max_tokens)
        capacity = PoolCapacity(slots=1, row_blocks=blocks, key_blocks=blocks, c128_blocks=blocks)
        self._pools = KvPools.allocate(geometry, capacity, model.device)
        self._table = torch.arange(blocks, dtype=torch.int32, device=model.device)

    @torch.inference_mode()
    def features(self, text: Text) -> Features:
        """Features of every row of the text, on the CPU. Raises: RequestError for a text without answers."""
        places = np.flatnonzero(text.answers >= 0)
        if not len(places):
            raise RequestError(f"{text.id}: no answer to learn from")
        self._pools.keys.zero_()  # what the last block has no entries for stays the same bytes
        tokens = torch.from_numpy(text.tokens).to(self._model.device)
        hidden, golden = [], []
        for start in range(0, len(text.tokens), CHUNK_TOKENS):
            part = tokens[start : start + CHUNK_TOKENS]
            chunk = PrefillChunk(0, start, self._table, self._table, self._table)
            inside = places[(places >= start) & (places < start + part.shape[0])] - start
            step = self._model.prefill(part, chunk, self._pools, all_logits=len(inside) > 0)
            if len(inside):
                rows = torch.from_numpy(inside).to(self._model.device)
                hidden.append(step.hidden[rows].to(torch.bfloat16))  # [rows, L, D]
                golden.append(_golden(step, rows, self._mass))
        return Features(
            text=text.id,
            num_entries=len(text.tokens) // C4_RATIO,
            positions=torch.from_numpy(places.astype(np.int32)),
            answers=torch.from_numpy(text.answers[places]),
            hidden=torch.cat(hidden).cpu(),
            keys=key_planes(self._pools.keys, self._model.geometry, self._layers, len(text.tokens)).cpu(),
            golden=Golden(
                counts=torch.cat([part.counts for part in golden]).cpu(),
                entries=torch.cat([part.entries for part in golden]).cpu(),
                masses=torch.cat([part.masses for part in golden]).cpu(),
            ),
        )


def key_planes(pool: Tensor, geometry: KvGeometry, layers: Sequence[int], num_tokens: int) -> Tensor:
    """Stored keys of these c4 layers: pool u8 [blocks, keys bytes] -> u8 [L, M, plane bytes]."""
    blocks = pool[: geometry.num_blocks(num_tokens)]  # [M, keys bytes]
    used = key_layout(geometry).plane_bytes
    starts = [layer * geometry.keys_plane_bytes for layer in layers]
    return torch.stack([blocks[:, start : start + used] for start in starts])


def _golden(step: StepOutput, rows: Tensor, mass: float) -> Golden:
    """Of all c4 layers at some of the step's tokens, token by token."""
    selected = torch.stack([tap.selected[rows] for tap in step.indexer], dim=1)  # [rows, C, k]
    scores = torch.stack([tap.scores[rows] for tap in step.indexer], dim=1)
    return golden_entries(selected.flatten(0, 1), scores.flatten(0, 1), mass=mass)
