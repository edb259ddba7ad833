"""One layer's attention: sliding window plus compressed rows, one shared key-value head, grouped output.

Keys and values are the same row and carry RoPE, so the output is rotated back at the query's position.
Prefill and decode both attend the *stored* rows, decoded, the chunk's own included.
Source: DeepSeek-V4 Attention (norms, per-head query norm without weight, sink, low-rank grouped output).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import C4_RATIO
from forepage.model.attention_mass import attention_mass
from forepage.model.branch import C4Branch, C128Branch, DecodeRows, Pulls, branch_of, exact_dtype
from forepage.model.indexer import IndexerTap
from forepage.model.kv_pools import PoolLayers
from forepage.model.norm import rms_norm, unit_rms
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.rope import Rotation
from forepage.model.spec import ModelSpec
from forepage.model.step import DecodeStep, PrefillStep, TokenRopes
from forepage.model.weight_matrix import WeightMatrix, matrix_of
from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.gather_rows import gather_rows
from forepage_kernels.layout import RowPool
from forepage_kernels.prefill_attention import prefill_attention
from forepage_kernels.sparse_decode import sparse_decode
from forepage_kernels.unpack_rows import unpack_rows


@dataclass(frozen=True)
class Attended:
    """One layer's attention output [n, D], and what its indexer selected and pulled, if it has one."""

    out: Tensor
    tap: IndexerTap | None = None
    pulls: Pulls | None = None
    mass: Tensor | None = None  # f32 [mass_tokens, index_topk] of a prefill that was asked for it

    def last(self) -> "Attended":
        """The last token's alone; the mass stays what was asked for."""
        return Attended(self.out[-1:], None if self.tap is None else self.tap.last(), mass=self.mass)


@dataclass(frozen=True)
class Attention:
    """Weights of one layer (H heads of d dims, G output groups) and its compressed branch, if any.

    Of several ranks each has H and G of its own; all else, the branch included, is the same on all.
    """

    layer: int
    wq_a: WeightMatrix  # [q_lora, D]
    wq_b: WeightMatrix  # [H * d, q_lora]
    wkv: WeightMatrix  # [d, D]
    wo_a: WeightMatrix  # [G * o_lora, H * d / G]
    wo_b: WeightMatrix  # [D, G * o_lora]
    q_norm: Tensor  # f32 [q_lora]
    kv_norm: Tensor  # f32 [d]
    sinks: Tensor  # f32 [H]
    branch: C4Branch | C128Branch | None
    dtype: torch.dtype
    spec: ModelSpec
    ranks: RankGroup

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], layer: int, spec: ModelSpec, ranks: RankGroup = ALONE
    ) -> "Attention":
        """Read `layers.{layer}.attn.*`, the rank's parts."""
        prefix = f"layers.{layer}.attn."

        return cls(
            layer=layer,
            wq_a=matrix_of(weights, f"{prefix}wq_a"),
            wq_b=matrix_of(weights, f"{prefix}wq_b"),
            wkv=matrix_of(weights, f"{prefix}wkv"),
            wo_a=matrix_of(weights, f"{prefix}wo_a"),
            wo_b=matrix_of(weights, f"{prefix}wo_b"),
            q_norm=weights[f"{prefix}q_norm.weight"],
            kv_norm=weights[f"{prefix}kv_norm.weight"],
            sinks=weights[f"{prefix}attn_sink"],
            branch=branch_of(weights, layer, spec),
            dtype=weights["embed.weight"].dtype,
            spec=spec,
            ranks=ranks,
        )

    def decode(self, x: Tensor, step: DecodeStep, pools: PoolLayers, arena: Tensor | None) -> Attended:
        """x [B, D], one token of each sequence. No value is read back to the host."""
        rope = self._rope(step.ropes)
        q, latent = self._query(x, rope)
        window = pools.window(self.layer)
        self._store_window(x, rope, window, step.window_store)
        if self.branch is None:
            rows = DecodeRows(pool=None, slots=step.window_slots[:, :0].contiguous())
        else:
            rows = self.branch.decode(x, latent, step, pools, arena)
        attended = sparse_decode(
            q, rows.pool, rows.slots, window, step.window_slots, self.sinks, softmax_scale=self._scale
        )
        return Attended(self._output(attended, rope), rows.tap, rows.pulls)

    def prefill(self, x: Tensor, step: PrefillStep, pools: PoolLayers) -> Attended:
        """x [S, D], consecutive tokens of one sequence."""
        rope = self._rope(step.ropes)
        q, latent = self._query(x, rope)
        window = self._window_rows(x, rope, step, pools)  # [before + S, d]
        rows = None if self.branch is None else self.branch.prefill(x, latent, step, pools)
        tap = None if rows is None else rows.tap
        attended = prefill_attention(
            q,
            window[:0] if rows is None else rows.rows,
            None if tap is None else tap.selected,
            window,
            self.sinks,
            start=step.start,
            ratio=C4_RATIO if rows is None else rows.ratio,
            window_tokens=self.spec.window_tokens,
            softmax_scale=self._scale,
        )
        mass = None
        if rows is not None and tap is not None and step.mass_tokens:
            mass = attention_mass(
                q[-step.mass_tokens :],
                rows.rows,
                tap.selected[-step.mass_tokens :],
                window,
                self.sinks,
                window_tokens=self.spec.window_tokens,
                softmax_scale=self._scale,
            )
        return Attended(self._output(attended, rope), tap, mass=mass)

    @property
    def _num_heads(self) -> int:
        return self.sinks.shape[0]

    @property
    def _scale(self) -> float:
        return float(self.spec.head_dim**-0.5)

    def _rope(self, ropes: TokenRopes) -> Rotation:
        return ropes.window if self.branch is None else ropes.compressed

    def _query(self, x: Tensor, rope: Rotation) -> tuple[Tensor, Tensor]:
        """x [n, D] -> queries [n, H, d], and the normed latent [n, q_lora] that the indexer reads too."""
        latent = rms_norm(self.wq_a.linear(x), self.q_norm, self.spec.norm_eps)
        q = self.wq_b.linear(latent).view(x.shape[0], self._num_heads, self.spec.head_dim)
        q = rope.per_head().apply(unit_rms(q, self.spec.norm_eps))
        return q.to(x.dtype), latent

    def _window_rows(self, x: Tensor, rope: Rotation, step: PrefillStep, pools: PoolLayers) -> Tensor:
        """Stored rows of the window before the chunk and of the chunk itself; the ring ends at its end.

        The chunk may be longer than the ring, so its rows are made in a pool of their own and the last
        ones are copied. Returns [before + S, d], decoded.
        """
        ring, width = pools.window(self.layer), self.spec.window_tokens
        first = step.slot * width
        before = torch.arange(max(step.start - width + 1, 0), step.start, device=x.device)
        dtype = exact_dtype(ring, x.dtype)
        old_rows = unpack_rows(ring, first + before % width, dtype)
        num_planes = -(-step.num_tokens // width)
        plane_bytes = pools.geometry.window_plane_bytes
        chunk = RowPool(x.new_zeros(num_planes, plane_bytes, dtype=torch.uint8), 0, ring.layout)
        places = torch.arange(step.num_tokens, device=x.device)
        self._store_window(x, rope, chunk, places)
        kept = places[-width:]
        gather_rows(
            ring,
            chunk.bytes.flatten(),
            slots=first + (step.start + kept) % width,
            plane_offsets=kept // width * plane_bytes,
            entries=kept % width,
        )
        return torch.cat((old_rows, unpack_rows(chunk, places, dtype)))

    def _store_window(self, x: Tensor, rope: Rotation, pool: RowPool, slots: Tensor) -> None:
        """Store the tokens' own rows: x [n, D], slots i64 [n]."""
        kv = self.wkv.linear(x).float().unsqueeze(1)  # [n, 1, d]: a window of one token
        gate = torch.zeros_like(kv)
        dims, eps = self.spec.rope_dims, self.spec.norm_eps
        compress_quantize(kv, gate, self.kv_norm, rope.cos, rope.sin, pool, slots, rope_dims=dims, eps=eps)

    def _output(self, attended: Tensor, rope: Rotation) -> Tensor:
        """attended [n, H, d] -> [n, D]: rotate back, then two low-rank products, the first per group.

        The second sums over all ranks' groups: each rank's product leaves its matrix multiply in the model's
        dtype, the sum of them is in fp32 and rounded once.
        """
        plain = rope.per_head().undo(attended).to(self.dtype)
        num_groups = self.spec.o_groups // self.ranks.num_ranks
        latent = self.wo_a.grouped_linear(plain.reshape(plain.shape[0], num_groups, -1))  # [n, G, o_lora]
        partial = self.wo_b.linear(latent.flatten(1))
        if self.ranks.num_ranks == 1:
            return partial
        return self.ranks.all_reduce(partial.float()).to(partial.dtype)
