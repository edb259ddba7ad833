"""Tensors as the checkpoint stores them: values that can be kept, or turned into plain ones.

Dequantising is exact in fp32 and in bf16: values have at most 4 significant bits, scales are powers of two.
Formats: `stored_form.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.model.stored_form import Form, Unit
from forepage_kernels.weight_formats import LARGEST_FP4_SCALE

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantisedFp8:
    """FP8 values with one scale per 128 x 128 of the whole matrix; a part may begin inside such a square.

    values e4m3 [O, I], scales e8m0 [.., ..]; `row_offset` and `column_offset` (< 128) say where in its
    square values[0, 0] lies.
    """

    values: Tensor
    scales: Tensor
    row_offset: int = 0
    column_offset: int = 0

    @property
    def unit(self) -> Unit:
        """What a scale stands for."""
        return _scale_unit(Form.FP8)

    def undecodable(self) -> str | None:
        """Why kernels can't compute with it as it is, if so."""
        if bool(((self.values.view(torch.uint8) & 0x7F) == 0x7F).any()):
            return "holds values that are no numbers"
        return None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[O, I] of this dtype, on the same device."""
        unit = self.unit
        rows = _unit_of_each(self.values.shape[0], self.row_offset, unit.rows, self.values.device)
        columns = _unit_of_each(self.values.shape[1], self.column_offset, unit.columns, self.values.device)
        scales = self.scales.float()[rows][:, columns]  # [O, I]
        return scales.mul_(self.values.float()).to(dtype)


@dataclass(frozen=True)
class QuantisedFp4:
    """E2M1 values, two a byte, the low nibble first; one scale per 32 of a row.

    values u8 [O, I/2], scales e8m0 [O, ceil(I/32)].
    """

    values: Tensor
    scales: Tensor

    @property
    def unit(self) -> Unit:
        """What a scale stands for."""
        return _scale_unit(Form.FP4)

    def undecodable(self) -> str | None:
        """Why kernels can't compute with it as it is, if so."""
        found, largest = int(self.scales.view(torch.uint8).max()), LARGEST_FP4_SCALE
        return None if found <= largest else f"has a scale of 2^{found - 127}, more than 2^{largest - 127}"

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[O, I] of this dtype, on the same device."""
        unit = self.unit
        rows, num_bytes = self.values.shape
        pairs = _nibble_pairs(self.values.device).index_select(0, self.values.flatten().int())  # [O * I/2, 2]
        columns = _unit_of_each(2 * num_bytes, 0, unit.columns, self.values.device)
        scales = self.scales.float()[:, columns]  # [O, I]
        return scales.mul_(pairs.view(rows, 2 * num_bytes)).to(dtype)


Stored = Tensor | QuantisedFp8 | QuantisedFp4


def dequantised(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The tensor's values as plain numbers."""
    return stored.to(dtype) if isinstance(stored, Tensor) else stored.dequantise(dtype)


def _scale_unit(form: Form) -> Unit:
    assert form.scales is not None
    return form.scales


def _unit_of_each(count: int, offset: int, unit: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) + offset) // unit


def _nibble_pairs(device: torch.device) -> Tensor:
    """f32 [256, 2]: the two values of each byte."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)  # bit 3 is the sign
    codes = torch.arange(256, device=device)
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=1)
