"""Token-level compressor: pools every 4 (or 128) tokens into one entry and stores it in a block pool.

Ratio 4 overlaps: each token gives an A half, for the next window's entry, and a B half, for its own;
entry w pools the A halves of tokens 4(w-1)..4w-1 and the B halves of 4w..4w+3 in one per-channel softmax.
Ratio 128 pools its own 128 tokens. The raw (kv, gate) of tokens that will be read again live in a ring
of fp32 state per sequence. Everything up to the stored row is fp32.
Source: DeepSeek-V4 compressor; the position bias (`ape`) is indexed by the token's place in its window.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import C4_RATIO
from forepage.model.fp32_linear import fp32_linear
from forepage.model.rope import Rotation
from forepage.model.spec import ModelSpec
from forepage.model.weights import side_by_side
from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.compress_token import Window, compress_token
from forepage_kernels.layout import KeyPool, RowPool

KV, GATE = 0, 1
"""The two planes of a token's state."""


@dataclass(frozen=True)
class EntryTarget:
    """Where new entries go: pool slots i64 [n] (negative: computed but not stored) and their rotation."""

    pool: RowPool | KeyPool
    slots: Tensor
    rope: Rotation


@dataclass(frozen=True)
class Compressor:
    """One compressor's weights; C channels per token: 2 * dims when windows overlap, else dims."""

    w_kv_gate: Tensor  # f32|bf16 [2 * C, D]
    position_bias: Tensor  # [ratio, C]
    norm: Tensor  # [dims]
    ratio: int
    spec: ModelSpec

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], prefix: str, ratio: int, spec: ModelSpec
    ) -> "Compressor":
        """Read `{prefix}wkv`, `wgate`, `norm` and `ape`."""
        projections = [weights[f"{prefix}{name}.weight"] for name in ("wkv", "wgate")]
        return cls(
            w_kv_gate=side_by_side(projections).flatten(0, 1),
            position_bias=weights[f"{prefix}ape"],
            norm=weights[f"{prefix}norm.weight"],
            ratio=ratio,
            spec=spec,
        )

    @property
    def overlaps(self) -> bool:
        """Whether an entry also pools the window before its own."""
        return self.ratio == C4_RATIO

    @property
    def dims(self) -> int:
        """Dims of an entry."""
        return self.norm.shape[0]

    @property
    def _window(self) -> Window:
        return Window(self.ratio, self.position_bias, self.norm, self.spec.rope_dims, self.spec.norm_eps)

    def decode(
        self, x: Tensor, state: Tensor, target: EntryTarget, *, slots: Tensor, positions: Tensor
    ) -> None:
        """Take one token per sequence; store the entry of each whose window it closes.

        `target.slots` is negative where none closed; no size depends on it.
        Shapes: x [B, D], state f32 [num_slots, 2, ring, C], slots and positions i64 [B].
        """
        compress_token(
            fp32_linear(x, self.w_kv_gate),
            state,
            slots,
            positions,
            self._window,
            pool=target.pool,
            targets=target.slots,
            cos=target.rope.cos,
            sin=target.rope.sin,
        )

    def prefill(self, x: Tensor, state: Tensor, target: EntryTarget, *, start: int) -> None:
        """Take consecutive tokens of one sequence; store every entry they close.

        Shapes: x [S, D], state f32 [2, ring, C] of the sequence; `target` holds one slot per closed entry.
        """
        ring, num_tokens = state.shape[1], x.shape[0]
        positions = torch.arange(start, start + num_tokens, device=x.device)
        tokens = self._project(x, positions)  # [S, 2, C]
        if num_entries := target.slots.shape[0]:
            history = torch.cat((self._open_tokens(state, start), tokens))  # [open + S, 2, C]
            windows = self._windows(history, num_entries)  # [n, W, 2, dims]
            self._store(windows[:, :, KV].contiguous(), windows[:, :, GATE].contiguous(), target)
        kept = slice(max(num_tokens - ring, 0), num_tokens)
        state[:, positions[kept] % ring] = tokens[kept].transpose(0, 1)

    def _project(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [n, D] -> (kv, gate with position bias) f32 [n, 2, C]."""
        kv, gate = fp32_linear(x, self.w_kv_gate).chunk(2, dim=-1)
        return torch.stack((kv, gate + self.position_bias[positions % self.ratio]), dim=1)

    def _open_tokens(self, state: Tensor, start: int) -> Tensor:
        """State of the tokens before `start` that later entries pool: [open, 2, C].

        That is the open window and, when windows overlap, the whole one before it (void before token 0).
        """
        ring = state.shape[1]
        first = start - start % self.ratio - (self.ratio if self.overlaps else 0)
        places = torch.arange(max(first, 0), start, device=state.device) % ring
        open_tokens = state[:, places].transpose(0, 1)  # [open, 2, C]
        if first >= 0:
            return open_tokens
        void = state.new_zeros(-first, 2, state.shape[2])
        void[:, GATE] = float("-inf")
        return torch.cat((void, open_tokens))

    def _windows(self, history: Tensor, num_entries: int) -> Tensor:
        """Tokens from the first pooled one on -> what each entry pools: [n, W, 2, dims]."""
        span = num_entries * self.ratio
        shape = (num_entries, self.ratio, 2, history.shape[-1])
        if not self.overlaps:
            return history[:span].view(shape)
        previous = history[:span].view(shape)[..., : self.dims]
        current = history[self.ratio : span + self.ratio].view(shape)[..., self.dims :]
        return torch.cat((previous, current), dim=1)

    def _store(self, kv: Tensor, gate: Tensor, target: EntryTarget) -> None:
        compress_quantize(
            kv,
            gate,
            self.norm,
            target.rope.cos,
            target.rope.sin,
            target.pool,
            target.slots,
            rope_dims=self.spec.rope_dims,
            eps=self.spec.norm_eps,
        )
