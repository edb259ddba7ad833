"""The experts that one rank holds, as a checkpoint stores them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fp4Experts:
    """E experts of M inner dims, model width D; values two a byte, one E8M0 code per 32 columns.

    w13 u8 [E, 2M, D/2] (gate over up), w13_scales u8 [E, 2M, D/32], w2 u8 [E, D, M/2], w2_scales
    u8 [E, D, M/32]. They are those from `first` on, of `total` that tokens choose among. Scale codes are at
    most 128 (`weight_formats.LARGEST_FP4_SCALE`).
    """

    w13: Tensor
    w13_scales: Tensor
    w2: Tensor
    w2_scales: Tensor
    first: int
    total: int

    @property
    def size(self) -> int:
        """Inner dims M."""
        return self.w13.shape[1] // 2

    @property
    def width(self) -> int:
        """Model width D."""
        return self.w2.shape[1]
