"""The memory indexer as it is trained: all target layers at once, gradients to the query side only.

The maths is that of `model/memory_indexer.py`, bf16 roundings included; keys are the model's own, frozen.
Matrices are fp32 masters; products run in `dtype` (bf16 on a GPU). q is rounded once more
when it is rotated, as kernels that score quantised keys do.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.model.indexer_tensors import PREFIX
from forepage.model.rope import rotation, yarn_frequencies
from forepage.model.spec import ModelSpec
from forepage.training.backbone.maths import rms_norm, rotate
from forepage_kernels.layout import KeyLayout, decode_keys, hadamard

HELD_SCORES = 1 << 27
"""Head scores [L, B, H, C] held at once where no gradient is wanted."""
NAMES = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")


class DualEncoder(nn.Module):
    """wq_a [L, R, D], q_norm [L, R], wq_b [L, H * Di, R], weights_proj [L, H, D]."""

    frequencies: Tensor
    turned: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        *,
        target_layers: Sequence[int],
        rotated: bool,
        dtype: torch.dtype,
    ) -> None:
        """`tensors` by released name; `rotated`: whether stored keys are."""
        super().__init__()
        self.target_layers = tuple(target_layers)
        self.dtype = dtype
        stacked = [
            torch.stack([tensors[f"{PREFIX}.l{layer}.{name}"].float() for layer in self.target_layers])
            for name in NAMES
        ]
        self.wq_a, self.q_norm, self.wq_b, self.weights_proj = (nn.Parameter(value) for value in stacked)
        self.heads = self.weights_proj.shape[1]
        self._dims = spec.index_dims
        self._eps = spec.norm_eps
        frequencies = yarn_frequencies(spec.rope_dims, spec.compress_rope_theta, spec.yarn)
        self.register_buffer("frequencies", frequencies.to(self.wq_a.device), persistent=False)
        eye = torch.eye(self._dims, device=self.wq_a.device)
        self.register_buffer("turned", hadamard(eye), persistent=False)
        self._rotated = rotated
        self._scale = self._dims**-0.5 * self.heads**-0.5

    def queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, L, D], positions [B] -> q [L, B, H, Di] in `dtype`, head weights f32 [L, B, H]."""
        x = hidden.transpose(0, 1).to(self.dtype)  # [L, B, D]
        latent = torch.bmm(x, self.wq_a.to(self.dtype).transpose(1, 2))  # [L, B, R]
        latent = rms_norm(latent, self.q_norm.unsqueeze(1), self._eps)
        q = torch.bmm(latent, self.wq_b.to(self.dtype).transpose(1, 2))
        q = q.unflatten(2, (self.heads, self._dims)).to(torch.bfloat16).float()  # [L, B, H, Di]
        turn = rotation(positions.long(), self.frequencies)
        q = rotate(q, turn.cos.unsqueeze(1), turn.sin.unsqueeze(1)).to(torch.bfloat16)
        weights = torch.bmm(x.float(), self.weights_proj.transpose(1, 2)) * self._scale
        if self._rotated:  # rounded again where it is scored: beside quantised keys queries are bf16
            q = (q.float() @ self.turned).to(torch.bfloat16)
        return q.to(self.dtype), weights

    def logits(self, asked: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """asked as `queries` gives it, keys [L, C, Di] in `dtype` -> f32 [L, B, C]."""
        q, weights = asked
        dots = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2))  # [L, B * H, C]
        dots = F.relu(dots).float().unflatten(1, q.shape[1:3]).flatten(0, 1)  # [L * B, H, C]
        return torch.bmm(weights.flatten(0, 1).unsqueeze(1), dots).view(*q.shape[:2], -1)

    @torch.no_grad()
    def all_logits(self, asked: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """As `logits`, for any number of entries, some at a time."""
        q = asked[0]
        step = max(1, HELD_SCORES // max(1, q.shape[0] * q.shape[1] * q.shape[2]))
        parts = [self.logits(asked, part) for part in keys.split(step, dim=1)]
        return torch.cat(parts, dim=2) if parts else q.new_zeros(*q.shape[:2], 0, dtype=torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the masters by released name."""
        values = (self.wq_a, self.q_norm, self.wq_b, self.weights_proj)
        return {
            f"{PREFIX}.l{layer}.{name}": value[place].detach().cpu().clone()
            for place, layer in enumerate(self.target_layers)
            for name, value in zip(NAMES, values, strict=True)
        }


def decoded_keys(planes: Tensor, layout: KeyLayout, dtype: torch.dtype) -> Tensor:
    """Stored planes u8 [L, M, plane bytes] -> [L, M * entries, Di] as stored; FP8 fits bf16 exactly."""
    layers, blocks, _ = planes.shape
    split = layout.entries * layout.value_bytes
    values = planes[..., :split].reshape(-1, layout.value_bytes)
    scales = planes[..., split : layout.plane_bytes].reshape(-1, layout.scale_bytes)
    return decode_keys(values, scales, layout).to(dtype).view(layers, blocks * layout.entries, -1)


def block_best(logits: Tensor) -> Tensor:
    """Of whole blocks of entries [..., M * entries] the best entry: [..., M]."""
    best: Tensor = logits.unflatten(-1, (-1, BLOCK_ENTRIES)).amax(-1)
    return best
