"""What the Lightning Indexers learn from a forward pass: where their layers' attention went.

For some tokens of a batch the target is made of the attention mass of the entries that the layer could see,
averaged over heads: every closed one, or in the sparse stage the chosen ones. The loss is the KL divergence
of the indexer's softmax over the same entries from it. What holds more than `cut` of the attention counts in
proportion; the rest together weighs `floor`, nearly flat but in order: so the top k still takes the best of
it, and the softmax names as evidence only what a token looked up. Nothing of the backbone gets a gradient.
Source: DeepSeek-V3.2's indexer training; the flat part is ours (cut 0 and flatness 1: the mass as it is).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import C4_RATIO
from forepage.training.backbone.batches import Batch
from forepage.training.backbone.config import IndexerConfig
from forepage.training.backbone.network import Watched
from forepage.training.backbone.packing import Packing

VOID = -1e30
EPS = 1e-9
FLAT_EPS = 1e-5


@dataclass(frozen=True)
class Sample:
    """Some tokens of a batch, and which entries are closed for each of them."""

    places: Tensor  # i64 [R]
    closed: Tensor  # bool [R, P]

    @classmethod
    def of(cls, batch: Batch, packing: Packing, count: int, draw: np.random.Generator) -> "Sample":
        """Half of the tokens from answers, half from anywhere."""
        answers = np.flatnonzero(batch.kinds)
        anywhere = draw.integers(len(batch.tokens), size=count - count // 2)
        asked = draw.choice(answers, size=count // 2) if len(answers) else anywhere[: count // 2]
        places = torch.from_numpy(np.concatenate((anywhere, asked))).to(packing.device)
        entries = torch.arange(packing.places, device=places.device) * C4_RATIO
        start = packing.starts[places].unsqueeze(1)
        return cls(places, (entries >= start) & (entries + C4_RATIO <= places.unsqueeze(1) + 1))


@dataclass(frozen=True)
class Fit:
    """How one layer's indexer does on a sample."""

    loss: Tensor
    kept: Tensor  # of the mass of the best k entries, the share that the indexer's best k hold
    evidence: Tensor  # entries that alone hold EVIDENCE_PROBABILITY of the softmax over the best k, a token


class Fitting:
    """A `Watch` that keeps each c4 layer's fit to one sample, in the order of layers."""

    def __init__(self, sample: Sample, target: IndexerConfig, topk: int) -> None:
        self.fits: list[Fit] = []
        self._sample = sample
        self._target = target
        self._topk = topk

    def __call__(self, watched: Watched) -> None:
        """Add the layer's fit."""
        places, closed = self._sample.places, self._sample.closed
        seen = closed if watched.chosen is None else watched.chosen[places]
        heads = watched.query.shape[1]
        with torch.no_grad():
            entries = watched.stored[: watched.rows.places]
            mass = attention_mass(watched.query[places], entries, watched.lse[places], closed)
            wanted = wanted_mass((mass / heads).masked_fill(~seen, 0.0), seen, self._target)
        scores = self._scores(watched)
        every = scores.detach().masked_fill(~closed, VOID)
        topk = min(self._topk, scores.shape[1])
        self.fits.append(
            Fit(
                divergence(scores.masked_fill(~seen, VOID), wanted),
                kept_mass(mass, every, topk),
                evidence_entries(every, topk),
            )
        )

    def loss(self) -> Tensor:
        """Of all layers."""
        return torch.stack([fit.loss for fit in self.fits]).sum()

    def figures(self) -> dict[str, list[float]]:
        """For the log, layer by layer."""
        return {
            "kl": [round(fit.loss.item(), 4) for fit in self.fits],
            "kept": [round(fit.kept.item(), 4) for fit in self.fits],
            "evidence": [round(fit.evidence.item(), 2) for fit in self.fits],
        }

    def _scores(self, watched: Watched) -> Tensor:
        """f32 [R, P], with gradients of the indexer alone."""
        attention, rows, places = watched.attention, watched.rows, self._sample.places
        indexer = attention.indexer
        assert indexer is not None
        with torch.no_grad():
            latent = attention.latent(watched.x[places])
        keys = indexer.keys(watched.x, rows)
        return indexer.scores(watched.x[places], latent, keys, (rows.cos[places], rows.sin[places]))


def divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    """KL of softmax(scores) from what is wanted, both f32 [R, P]; a token counts by how much it wants."""
    total = wanted.sum(1)
    target = wanted / (total.unsqueeze(1) + EPS)
    each = (target * ((target + EPS).log() - torch.log_softmax(scores, dim=1))).sum(1)
    return (each * total).sum() / (total.sum() + EPS)


def attention_mass(query: Tensor, entries: Tensor, lse: Tensor, closed: Tensor) -> Tensor:
    """query [R, H, d], entries [P, d], lse f32 [R, H] of all rows and sink -> f32 [R, P], heads summed."""
    total = torch.zeros(closed.shape, device=query.device)
    for head in range(query.shape[1]):
        logits = (query[:, head] @ entries.T).float() * query.shape[-1] ** -0.5
        total += torch.exp(logits - lse[:, head, None])
    return total.masked_fill(~closed, 0.0)


def wanted_mass(share: Tensor, closed: Tensor, plan: IndexerConfig) -> Tensor:
    """What the softmax of the scores is to be proportional to: share of attention [R, P] -> f32 [R, P]."""
    flat = (share + FLAT_EPS).pow(plan.flatness).masked_fill(~closed, 0.0)
    flat = flat / flat.sum(1, keepdim=True).clamp(min=EPS)
    return (share - plan.cut).clamp(min=0.0) + plan.floor * flat


def evidence_entries(scores: Tensor, count: int) -> Tensor:
    """How many of a token's best entries alone hold EVIDENCE_PROBABILITY of their softmax, on average."""
    shares = torch.softmax(scores.topk(count, dim=1).values, dim=1)
    counts: Tensor = (shares >= EVIDENCE_PROBABILITY).sum(1)
    return counts.float().mean()


def kept_mass(mass: Tensor, scores: Tensor, count: int) -> Tensor:
    """Mass of the `count` entries of highest score, over that of the `count` of most mass; all f32 [R, P]."""
    best = mass.topk(count, dim=1).values.sum()
    return mass.gather(1, scores.topk(count, dim=1).indices).sum() / best.clamp(min=EPS)
