"""Take one token of each sequence into its compressor; store the entry of each window that it closes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.compress_token import reference
from forepage_kernels.errors import ShapeError
from forepage_kernels.layout import KeyPool, RowPool


@dataclass(frozen=True)
class Window:
    """How a compressor pools `ratio` tokens of C channels into an entry of d dims.

    position_bias f32 [ratio, C], norm_weight f32 [d]. C = 2 * d: an entry pools the A half (first d channels)
    of the window before and the B half of its own; the state ring holds both. C = d: its own window alone.
    """

    ratio: int
    position_bias: Tensor
    norm_weight: Tensor
    rope_dims: int
    eps: float

    @property
    def overlaps(self) -> bool:
        """Whether an entry also pools the window before its own."""
        return self.position_bias.shape[1] != self.norm_weight.shape[0]


def compress_token(
    projected: Tensor,
    state: Tensor,
    slots: Tensor,
    positions: Tensor,
    how: Window,
    *,
    pool: RowPool | KeyPool,
    targets: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """state[slot, :, position % ring] <- (kv, gate + bias); entries are pooled, normed, turned and stored.

    Shapes: projected f32 [B, 2 * C] (kv, then gate), state f32 [num_slots, 2, ring, C] (one slot of it is
    contiguous), slots, positions, targets i64 [B], cos, sin f32 [B, rope_dims / 2] at an entry's first token.
    `targets` is the entry's slot in the pool, negative where no window closes (then nothing is pooled). Entry
    0 has no window before it. Sequences have distinct slots, but for rows whose results nobody reads.
    Source: DeepSeek-V4 inference/model.py, Compressor.forward (decode).
    """
    device, dims, channels = pool.bytes.device, how.norm_weight.shape[0], how.position_bias.shape[1]
    batch = slots.shape[0]
    ring = how.ratio * (2 if how.overlaps else 1)
    if dims != pool.layout.dims or channels not in (dims, 2 * dims):
        raise ShapeError(
            f"position_bias: {channels} channels for entries of {dims} dims in a pool of another"
        )
    check_tensor("projected", projected, dtype=torch.float32, shape=[batch, 2 * channels], device=device)
    for name, weight, shape in (
        ("position_bias", how.position_bias, [how.ratio, channels]),
        ("norm_weight", how.norm_weight, [dims]),
    ):
        check_tensor(name, weight, dtype=torch.float32, shape=shape, device=device)
    if state.shape[1:] != (2, ring, channels) or not state[0].is_contiguous() or state.dtype != torch.float32:
        raise ShapeError(
            f"state: must be f32 [*, 2, {ring}, {channels}], got {state.dtype} {list(state.shape)}"
        )
    for name, index in (("slots", slots), ("positions", positions), ("targets", targets)):
        check_tensor(name, index, dtype=torch.int64, shape=[batch], device=device)
    for name, angle in (("cos", cos), ("sin", sin)):
        check_tensor(name, angle, dtype=torch.float32, shape=[batch, how.rope_dims // 2], device=device)
    if projected.is_cuda and pool.layout.format != "fp32":
        from forepage_kernels.compress_token.kernel import compress_token as launch

        store = launch
    else:
        store = reference.compress_token
    store(projected, state, slots, positions, how, pool=pool, targets=targets, cos=cos, sin=sin)
