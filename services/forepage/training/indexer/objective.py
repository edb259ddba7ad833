"""What a plan's scores are trained towards: focal yes-or-no, or the mass's distribution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.training.indexer.config import Loss

VOID = -1e30
"""A score that takes no part in a softmax; finite, because its gradient must be."""


def focal(logits: Tensor, wanted: Tensor, valid: Tensor, *, gamma: float, positive_weight: float) -> Tensor:
    """Focal cross-entropy of each plan, over its number of wanted candidates (at least one).

    Shapes: logits f32 [..., B, C], wanted and valid bool [..., B, C] or [B, C] -> f32 [..., B]. Divided by
    the wanted only, as in RetinaNet: a plan counts the same however many easy negatives stand beside.
    """
    target = wanted.expand_as(logits).float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missing = 1 - torch.exp(-entropy)  # 1 - p of the truth
    weight = torch.where(wanted, positive_weight, 1.0) * valid
    return (missing**gamma * entropy * weight).sum(-1) / (wanted & valid).sum(-1).clamp(min=1)


def mass_divergence(logits: Tensor, mass: Tensor, valid: Tensor) -> Tensor:
    """KL from the shares of the mass to the softmax of the scores; 0 for a plan without mass.

    Shapes: logits f32 [..., B, C], mass f32 and valid bool [..., B, C] or [B, C] -> f32 [..., B].
    """
    mass = mass * valid
    total = mass.sum(-1, keepdim=True)
    share = mass / total.clamp(min=1e-9)
    shown = torch.log_softmax(logits.masked_fill(~valid, VOID), dim=-1)
    known = torch.where(share > 0, share.clamp(min=1e-30).log(), 0.0)
    return (share * (known - shown)).sum(-1) * (total.squeeze(-1) > 0)


def plan_losses(
    loss: Loss, logits: Tensor, mass: Tensor, valid: Tensor, *, gamma: float, positive_weight: float
) -> Tensor:
    """The chosen loss of each plan; an entry is wanted where its mass is above 0."""
    if loss is Loss.MASS:
        return mass_divergence(logits, mass, valid)
    return focal(logits, mass > 0, valid, gamma=gamma, positive_weight=positive_weight)
