"""`forepage train synthetic-dump`: features of no model, at any model's sizes, with a rule to learn.

Every answer has an entry that all its steps want at every c4 layer; its hidden states are a fixed
linear map of a part of its key, plus noise. Keys are random, stored as a cold pool stores them. For
speed, memory and tests: what trains on it is the very code that trains on a real dump.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from forepage.kv.geometry import C4_RATIO, KeyFormat
from forepage.training.indexer.config import DumpConfig, IndexerTrainingConfig
from forepage.training.indexer.dump import header_of
from forepage.training.indexer.features import Features, TextId
from forepage.training.indexer.golden import Golden
from forepage.training.indexer.shards import DumpHeader, open_dump, stored_numbers, write_features
from forepage.training.indexer.texts import text_ids
from forepage_kernels.layout import KeyLayout, encode_keys, hadamard

NEEDLES = 1
NEEDLE_MASS = 0.5
ANSWER_ROWS = 24
NOISE = 0.25
TOLD_DIMS, TOLD_GAIN = 24, 2.0
"""Of a key, before the dims that turn with the position: what hidden states are told, and its gain."""
MEAN = 1.0
"""As real hidden states have one: head weights are linear in them, so without it no head could always add."""


@dataclass(frozen=True)
class SyntheticSizes:
    """What features are shaped by."""

    hidden_size: int
    num_c4_layers: int
    layers: int
    layout: KeyLayout


def synthetic_dump(config: IndexerTrainingConfig, model_config: Mapping[str, object], folder: Path) -> int:
    """Write all texts of the config; how many rows. Raises: ModelFormatError."""
    digest = json.dumps(config.dump.seed)
    header = header_of(config.dump, dict(model_config), f"synthetic-{digest}", KeyFormat.FP8)
    open_dump(folder, header)
    sizes, there = sizes_of(header), stored_numbers(folder)
    rows = 0
    for number, text in enumerate(text_ids(config.dump)):
        if number not in there:
            features = synthetic_features(text, sizes, config.dump)
            write_features(folder, number, features)
            rows += features.num_rows
    return rows


def sizes_of(header: DumpHeader) -> SyntheticSizes:
    """Sizes of the header's model."""
    spec = header.spec
    return SyntheticSizes(
        hidden_size=spec.hidden_size,
        num_c4_layers=len(spec.c4_layers),
        layers=len(header.target_layers),
        layout=header.key_layout,
    )


def synthetic_features(text: TextId, sizes: SyntheticSizes, config: DumpConfig) -> Features:
    """One text's features, the same for the same id."""
    draw = torch.Generator().manual_seed(text.seed)
    entries = text.length_tokens // C4_RATIO
    blocks = -(-entries // sizes.layout.entries)
    shape = (sizes.layers, blocks * sizes.layout.entries, sizes.layout.dims)
    keys = torch.randn(shape, generator=draw)  # before rotation
    keys[..., :TOLD_DIMS] *= TOLD_GAIN
    answers = max(1, config.rows // ANSWER_ROWS)
    far = max(1, entries // 2)
    needles = torch.randint(far, (answers, NEEDLES), generator=draw)  # in the first half
    rows = answers * ANSWER_ROWS
    content = keys[:, needles, :TOLD_DIMS] / TOLD_GAIN  # [L, answers, NEEDLES, told]
    told = content.sum(2) @ _linear_map(sizes)  # [L, answers, D]
    hidden = told.repeat_interleave(ANSWER_ROWS, dim=1).transpose(0, 1)  # [rows, L, D]
    hidden = MEAN + hidden + NOISE * torch.randn(hidden.shape, generator=draw)
    return Features(
        text=text,
        num_entries=entries,
        positions=(torch.arange(rows) + text.length_tokens - rows).to(torch.int32),
        answers=torch.arange(answers, dtype=torch.int32).repeat_interleave(ANSWER_ROWS),
        hidden=hidden.to(torch.bfloat16),
        keys=_stored(keys, sizes.layout),
        golden=_golden(needles, sizes.num_c4_layers),
    )


def _linear_map(sizes: SyntheticSizes) -> Tensor:
    """What keys tell to hidden states, the same in every text: [told, D] of unit gain."""
    draw = torch.Generator().manual_seed(7)
    gains: Tensor = torch.randn(TOLD_DIMS, sizes.hidden_size, generator=draw)
    return gains * float(TOLD_DIMS**-0.5)


def _stored(keys: Tensor, layout: KeyLayout) -> Tensor:
    """f32 [L, M * entries, Di] -> planes u8 [L, M, plane bytes]."""
    layers = keys.shape[0]
    rotated = hadamard(keys) if layout.rotated else keys
    values, scales = encode_keys(rotated.reshape(-1, layout.dims), layout)
    per_block = layout.entries
    return torch.cat(
        (
            values.view(layers, -1, per_block * layout.value_bytes),
            scales.view(layers, -1, per_block * layout.scale_bytes),
        ),
        dim=2,
    )


def _golden(needles: Tensor, num_c4_layers: int) -> Golden:
    """Each row and layer has its answer's needles, with equal masses."""
    per_row = needles.sort(dim=1).values.repeat_interleave(ANSWER_ROWS * num_c4_layers, dim=0)
    return Golden(
        counts=torch.full((per_row.shape[0],), NEEDLES, dtype=torch.int32),
        entries=per_row.flatten().to(torch.int32),
        masses=torch.full((per_row.numel(),), NEEDLE_MASS),
    )
