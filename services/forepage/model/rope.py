"""Rotary positions: interleaved pairs on the trailing dims, one frequency table per layer kind.

Layers without a compressor use theta 10,000 and no scaling; all others theta 160,000 with YaRN, for
queries, window rows, compressed rows and indexer alike. Angles are the fp32 product position * frequency:
at a million tokens that is 0.015 away from the exact cosine, and it is what the weights were trained with.
Source: DeepSeek-V4 inference code (frequencies without mscale).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.model.spec import ModelSpec, YarnScaling
from forepage_kernels.row_turn import turn_pairs


@dataclass(frozen=True)
class Rotation:
    """cos and sin of one set of positions: f32 [..., rope_dims / 2]."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the trailing dims of x [..., d] (leading dims broadcast); same dtype out."""
        return turn_pairs(x, self.cos, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        """Rotate back: the conjugate, used on attention output because values carry positions too."""
        return turn_pairs(x, self.cos, self.sin, inverse=True)

    def per_head(self) -> "Rotation":
        """The same for x with a head axis before the last: [..., 1, rope_dims / 2]."""
        return Rotation(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))


@dataclass(frozen=True)
class RopeFrequencies:
    """Inverse frequencies of both layer kinds: f32 [rope_dims / 2] each."""

    window: Tensor
    compressed: Tensor

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: torch.device) -> "RopeFrequencies":
        """Computed on the CPU, so that every device gets the same bits."""
        window = inverse_frequencies(spec.rope_dims, spec.rope_theta)
        compressed = yarn_frequencies(spec.rope_dims, spec.compress_rope_theta, spec.yarn)
        return cls(window=window.to(device), compressed=compressed.to(device))


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """cos and sin at positions i64 [...] -> [..., rope_dims / 2]."""
    angles = positions.unsqueeze(-1).float() * frequencies  # [..., rope_dims / 2]
    return Rotation(angles.cos(), angles.sin())


def inverse_frequencies(dims: int, theta: float) -> Tensor:
    """theta ** (-2i / dims) for each pair i, in fp32."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    return 1.0 / (theta**exponents)


def yarn_frequencies(dims: int, theta: float, yarn: YarnScaling) -> Tensor:
    """Slow pairs are stretched by `factor`, fast ones kept, a linear ramp between."""
    frequencies = inverse_frequencies(dims, theta)
    low = max(math.floor(_pair_turning(yarn.beta_fast, dims, theta, yarn.original_max_position)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, dims, theta, yarn.original_max_position)), dims - 1)
    span = high - low if high > low else 0.001
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def _pair_turning(turns: float, dims: int, theta: float, max_position: int) -> float:
    """The (fractional) pair index that makes `turns` full turns over max_position tokens."""
    return dims * math.log(max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))
