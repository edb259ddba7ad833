"""What a model takes: bytes of a rank's weights, of a sequence's KV, and how many sequences fit; pure.

The KV rules are the worker's own (quota and admission): a block is promised before it is held, finished
blocks and resume records go to the host in every mode.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from forepage.kv.budget import budget_for
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO, C128_RATIO, KvGeometry
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Span, StoredTensor, stored_parts
from forepage.model.tensor_parallel import rank_span
from forepage.model.weight_table import WeightEntry, weight_table
from forepage.settings import ResidencyMode, WorkerSettings

TAIL_BLOCKS = 4
"""Always resident beyond `recent_tokens`: the tail's two ragged ends and a late commit's growth."""
RESUME_POINTS = 2
"""Resume records beside the periodic ones: at the end of the prompt and of the answer."""


@dataclass(frozen=True)
class KvCost:
    """Bytes of one sequence's KV by component, without page padding and compressor state."""

    rows: int
    keys: int
    c128: int
    window: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.rows + self.keys + self.c128 + self.window


def kv_cost(geometry: KvGeometry, num_tokens: int) -> KvCost:
    """What `num_tokens` tokens cost when all of it is kept."""
    entries = len(geometry.c4_layers) * (num_tokens // C4_RATIO)
    return KvCost(
        rows=entries * geometry.row_bytes,
        keys=entries * geometry.key_bytes,
        c128=len(geometry.c128_layers) * (num_tokens // C128_RATIO) * geometry.row_bytes,
        window=geometry.window_bytes,
    )


def rank_bytes(spec: ModelSpec, stored: Mapping[str, StoredTensor], num_ranks: int) -> int:
    """Most bytes that a rank keeps of the weights, as stored (`can_split` must hold)."""

    def size(name: str, entry: WeightEntry, span: Span) -> int:
        return sum(part.num_bytes for _, part in stored_parts(name, entry, stored[name].dtype, span))

    return _largest_rank(spec, num_ranks, size)


def held_bytes(
    spec: ModelSpec, num_ranks: int, form: HeldForm, stored: Mapping[str, StoredTensor] | None = None
) -> int:
    """Most bytes that a rank holds of the weights once loaded (`can_split` must hold).

    `stored`: the checkpoint's tensors; none: plain ones.
    """

    def size(name: str, entry: WeightEntry, span: Span) -> int:
        dtype = None if stored is None else stored[name].dtype
        return sum(part.num_bytes for _, part in form.parts(name, entry, dtype, span))

    return _largest_rank(spec, num_ranks, size)


def _largest_rank(spec: ModelSpec, num_ranks: int, size: Callable[[str, WeightEntry, Span], int]) -> int:
    """The largest sum over what a rank has of each tensor."""
    totals = [0] * num_ranks
    for name, entry in weight_table(spec).items():
        for rank in range(num_ranks):
            span = rank_span(entry, spec, rank=rank, num_ranks=num_ranks)
            if span is not None:
                totals[rank] += size(name, entry, span)
    return max(totals)


@dataclass(frozen=True)
class SequenceFootprint:
    """Bytes one sequence takes: on the GPU while prefilled and while decoded, and in host memory."""

    prefill: int
    decode: int
    host: int

    def num_on_gpu(self, free_bytes: int) -> int:
        """Sequences that fit when one at a time is prefilled."""
        most = max(self.prefill, self.decode)
        return 0 if most > free_bytes else 1 + (free_bytes - most) // self.decode

    def num_on_host(self, host_bytes: int) -> int:
        """Sequences whose blocks and resume records fit."""
        return host_bytes // self.host


def sequence_footprint(
    geometry: KvGeometry, settings: WorkerSettings, mode: ResidencyMode, *, num_tokens: int, topk: int
) -> SequenceFootprint:
    """A sequence of `num_tokens` tokens, nearly all of them prompt, paged at the settings' budget."""
    total = geometry.num_blocks(num_tokens)
    recent = -(-settings.recent_tokens // geometry.block_tokens) + TAIL_BLOCKS
    paged = min(total, (settings.budget_blocks or budget_for(total)) + recent + settings.load_slack_blocks)
    staging = -(-topk // BLOCK_ENTRIES) if mode is ResidencyMode.EXACT else 0
    rows = total if mode is ResidencyMode.FULL else paged + staging
    keys = total if mode in (ResidencyMode.FULL, ResidencyMode.EXACT) else paged

    def on_gpu(row_blocks: int, key_blocks: int) -> int:
        held = geometry.kv_bytes(num_tokens=num_tokens, row_blocks=row_blocks, key_blocks=key_blocks)
        return int(held)

    points = num_tokens // settings.resume_every_tokens + RESUME_POINTS
    slots = total + points * -(-geometry.resume_bytes // geometry.slot_bytes)
    return SequenceFootprint(
        prefill=on_gpu(max(total + staging, rows), total),
        decode=on_gpu(rows, keys),
        host=slots * geometry.slot_bytes,
    )
