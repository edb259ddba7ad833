"""An FP8 matrix as a checkpoint stores it; several of one shape may lie below one another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError

FP8_TILE = 128
"""Rows and columns that share a scale."""


@dataclass(frozen=True)
class Fp8Weight:
    """values e4m3 [P * R, I] without NaN codes, scales e8m0 [P * ceil(R / 128), ceil(I / 128)].

    P parts of R = `part_rows` rows each have squares of their own, the last ones of a part may be cut.
    """

    values: Tensor
    scales: Tensor
    part_rows: int

    def check(self, device: torch.device) -> None:
        """Raises: ShapeError."""
        rows, inputs = self.values.shape
        if inputs % 2 or self.part_rows < 1 or rows % self.part_rows:
            raise ShapeError(f"weight: [{rows}, {inputs}] in parts of {self.part_rows} rows")
        check_tensor("values", self.values, dtype=torch.float8_e4m3fn, shape=[rows, inputs], device=device)
        squares = [rows // self.part_rows * -(-self.part_rows // FP8_TILE), -(-inputs // FP8_TILE)]
        check_tensor("scales", self.scales, dtype=torch.float8_e8m0fnu, shape=squares, device=device)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[P * R, I] as plain numbers; exact in bf16 and fp32."""
        rows, inputs = self.values.shape
        row = torch.arange(rows, device=self.values.device)
        squares = row // self.part_rows * -(-self.part_rows // FP8_TILE) + row % self.part_rows // FP8_TILE
        columns = torch.arange(inputs, device=row.device) // FP8_TILE
        scales = self.scales.float()[squares][:, columns]  # [P * R, I]
        return scales.mul_(self.values.float()).to(dtype)
