"""A weight matrix that knows the form it is held in; layers only multiply with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.model.stored_form import SCALE_SUFFIX, WEIGHT_SUFFIX
from forepage.model.weights import side_by_side
from forepage_kernels.fp8_linear import Fp8Weight, fp8_linear


class WeightMatrix(Protocol):
    """A matrix [O, I]."""

    def linear(self, x: Tensor) -> Tensor:
        """x [n, I] -> [n, O]."""
        ...

    def grouped_linear(self, x: Tensor) -> Tensor:
        """x [n, G, I] -> [n, G, O / G]: each group meets its own share of the rows."""
        ...


@dataclass(frozen=True)
class PlainMatrix:
    """Held in the model's dtype."""

    weight: Tensor

    def linear(self, x: Tensor) -> Tensor:
        """See the protocol."""
        return F.linear(x, self.weight)

    def grouped_linear(self, x: Tensor) -> Tensor:
        """See the protocol."""
        return torch.einsum("ngi,gri->ngr", x, self.weight.view(x.shape[1], -1, x.shape[2]))


@dataclass(frozen=True)
class Fp8Matrix:
    """Held as stored."""

    weight: Fp8Weight

    def linear(self, x: Tensor) -> Tensor:
        """See the protocol."""
        return self.grouped_linear(x.unsqueeze(1)).squeeze(1)

    def grouped_linear(self, x: Tensor) -> Tensor:
        """See the protocol."""
        return fp8_linear(x.contiguous(), self.weight)


def matrix_of(weights: Mapping[str, Tensor], *names: str) -> WeightMatrix:
    """The matrix `name`, or several of one shape below one another, in the form that `weights` has them."""
    values = _below_one_another([weights[name + WEIGHT_SUFFIX] for name in names])
    if names[0] + SCALE_SUFFIX not in weights:
        return PlainMatrix(values)
    scales = _below_one_another([weights[name + SCALE_SUFFIX] for name in names])
    return Fp8Matrix(Fp8Weight(values, scales, part_rows=values.shape[0] // len(names)))


def _below_one_another(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else side_by_side(list(parts)).flatten(0, 1)
