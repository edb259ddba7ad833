"""Muon: momentum, then the nearest orthogonal matrix by Newton-Schulz, for all matrices of one shape at once.

Nothing is read back to the host and rates are tensors, so a step can be captured in a graph.
Source: Muon (K. Jordan et al., 2024), its quintic iteration and its scale by shape.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


class Muon:
    """Parameters of two or more dims; the last two are a matrix [out, in], others count matrices."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: Tensor, momentum: float, weight_decay: float
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for idx, parameter in enumerate(self.parameters):
            self._shapes[min(parameter.shape[-2:]), max(parameter.shape[-2:])].append(idx)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient (all or none of them, in one run)."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if len(gradients) != len(self.parameters):
            raise RuntimeError("muon: a parameter has no gradient")
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, gradients)
        looked_ahead = torch._foreach_add(gradients, self.buffers, alpha=self.momentum)
        torch._foreach_mul_(self.parameters, 1 - self.lr * self.weight_decay)
        for indices in self._shapes.values():
            updates = orthogonalised(torch.cat([_wide(looked_ahead[idx]) for idx in indices]))
            start = 0
            for idx in indices:
                parameter = self.parameters[idx]
                count = parameter[..., 0, 0].numel()
                update = updates[start : start + count].float()
                start += count
                if parameter.shape[-2] > parameter.shape[-1]:
                    update = update.transpose(-1, -2) * (parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.sub_(update.reshape(parameter.shape) * self.lr)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[m, rows, columns], rows <= columns -> bf16, each with singular values near 1."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + EPS).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(matrix: Tensor) -> Tensor:
    """[..., r, c] -> [m, min, max]."""
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    return flat.transpose(-1, -2) if flat.shape[-2] > flat.shape[-1] else flat
