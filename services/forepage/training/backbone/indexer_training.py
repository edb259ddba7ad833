"""The Lightning Indexers' dense warm-up: the backbone frozen, each learns where its layer's attention goes.

For some tokens of a batch, half of them within answers, the target is made of the attention mass of every
closed entry, averaged over heads; the loss is the KL divergence of the indexer's softmax from it. What holds
more than `cut` of the attention counts in proportion; the rest together weighs `floor`, nearly flat but in
order: so the top k still takes the best of it, and the softmax names as evidence only what a token looked up.
Source: DeepSeek-V3.2's indexer training, first stage; the flat part is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import C4_RATIO
from forepage.training.backbone.batch_stream import BatchStream, Feeder
from forepage.training.backbone.batches import Batch
from forepage.training.backbone.config import IndexerConfig, StageConfig, TrainingConfig
from forepage.training.backbone.journal import Journal
from forepage.training.backbone.network import Backbone, Inputs, Layer
from forepage.training.backbone.optimizer import INDEXER, Optimizer
from forepage.training.backbone.packing import Packing
from forepage.training.backbone.rows import LayerRows

VOID = -1e30
EPS = 1e-9
FLAT_EPS = 1e-5
READ_EVERY_S = 5.0
BATCH_STREAM = 1000
"""Stage number of its batches: none that the curriculum has drawn."""


@dataclass(frozen=True)
class Sample:
    """Some tokens of a batch, and which entries each of them may see."""

    places: Tensor  # i64 [R]
    closed: Tensor  # bool [R, P]


@dataclass(frozen=True)
class Fit:
    """How one layer's indexer does on a sample."""

    loss: Tensor
    kept: Tensor  # of the mass of the best k entries, the share that the indexer's best k hold
    evidence: Tensor  # entries that alone hold EVIDENCE_PROBABILITY of the softmax over the best k, a token


class IndexerTraining:
    """Trains the indexers of a network in place."""

    def __init__(self, network: Backbone, config: TrainingConfig) -> None:
        spec, device, plan = network.spec, network.embedding.device, config.indexer
        self.network = network
        self.config = config
        self.stage = StageConfig("indexer", plan.length, plan.tokens, 1.0, None, plan.records, 0.0, 1.0, True)
        self.inputs = Inputs.empty(plan.tokens, device)
        self.packing = Packing(
            plan.tokens, spec.compress_ratios, window_tokens=spec.window_tokens, device=device
        )
        self.packing.pack([plan.length] * (plan.tokens // plan.length))
        self.inputs.fp8_share.fill_(1.0)
        trained = [item for item in network.named_parameters() if INDEXER in item[0]]
        self.optimizer = Optimizer(trained, replace(config.optimizer, clip=plan.clip))
        self._draw = np.random.default_rng(config.seed)

    def train(
        self,
        stream: BatchStream,
        journal: Journal,
        *,
        until: float,
        clock: Callable[[], float],
        steps: int | None,
    ) -> int:
        """Train until the clock says so, or for so many steps; how many were taken."""
        trained = {name: value for name, value in self.network.named_parameters() if INDEXER in name}
        for value in trained.values():
            value.requires_grad_()
        feeder, began, taken, read = Feeder(self.inputs), clock(), 0, clock()
        with stream.stage(self.stage, BATCH_STREAM, 0) as batches:
            while clock() < until and taken != steps:
                done = (clock() - began) / (until - began) if steps is None else taken / steps
                warm = min(1.0, (taken + 1) / self.config.optimizer.warmup_steps)
                fits = self._step(next(batches), feeder, warm * (1 - done))
                taken += 1
                if clock() - read > READ_EVERY_S:
                    self._note(journal, clock() - began, taken, fits)
                    read = clock()
        if taken:
            self._note(journal, clock() - began, taken, fits)
        for value in trained.values():
            value.requires_grad_(False)
        return taken

    def _step(self, batch: Batch, feeder: Feeder, factor: float) -> list[Fit]:
        feeder.feed(batch)
        self.optimizer.set_rates(factor)
        fits = self._fits(self._sample(batch))
        torch.stack([fit.loss for fit in fits]).sum().backward()
        self.optimizer.step()
        for parameter in self.network.parameters():
            parameter.grad = None
        return fits

    def _sample(self, batch: Batch) -> Sample:
        """Half of the tokens from answers, half from anywhere."""
        count = self.config.indexer.rows
        answers = np.flatnonzero(batch.kinds)
        anywhere = self._draw.integers(len(batch.tokens), size=count - count // 2)
        asked = self._draw.choice(answers, size=count // 2) if len(answers) else anywhere[: count // 2]
        places = torch.from_numpy(np.concatenate((anywhere, asked))).to(self.packing.device)
        entries = torch.arange(self.packing.places, device=places.device) * C4_RATIO
        start = self.packing.starts[places].unsqueeze(1)
        return Sample(places, (entries >= start) & (entries + C4_RATIO <= places.unsqueeze(1) + 1))

    def _fits(self, sample: Sample) -> list[Fit]:
        """One forward of the backbone, layer by layer; nothing of it gets a gradient."""
        network, inputs = self.network, self.inputs
        rows: Mapping[int, LayerRows] = network.rows(inputs, self.packing)
        streams, fits = network.embedded(inputs.tokens), []
        for layer in network.layers:
            assert isinstance(layer, Layer)
            own = rows[layer.ratio]
            x, post, comb, query, window = layer.read(
                streams, own.cos, own.sin, own.flattening, own.fp8_share
            )
            stored = own.stored(layer.entries(x, own), window)
            attended, lse = layer.attend(query, stored, layer.attention.sink, own.visible)
            if layer.attention.indexer is not None:
                fits.append(
                    self._fit(layer, x.detach(), query.detach(), stored.detach(), lse.detach(), own, sample)
                )
            forced = layer.experts.forced(inputs.tokens)
            streams, _ = layer.write(
                streams, post, comb, attended, own.cos, own.sin, forced, layer.experts.bias
            )
        return fits

    def _fit(
        self,
        layer: Layer,
        x: Tensor,
        query: Tensor,
        stored: Tensor,
        lse: Tensor,
        rows: LayerRows,
        sample: Sample,
    ) -> Fit:
        indexer, places = layer.attention.indexer, sample.places
        assert indexer is not None
        with torch.no_grad():
            mass = attention_mass(query[places], stored[: rows.places], lse[places], sample.closed)
            latent = layer.attention.latent(x[places])
        scores = indexer.scores(
            x[places], latent, indexer.keys(x, rows), (rows.cos[places], rows.sin[places])
        ).masked_fill(~sample.closed, VOID)
        plan = self.config.indexer
        wanted = wanted_mass(mass / query.shape[1], sample.closed, plan)
        total = wanted.sum(1)
        target = wanted / (total.unsqueeze(1) + EPS)
        divergence = (target * ((target + EPS).log() - torch.log_softmax(scores, dim=1))).sum(1)
        return Fit(
            (divergence * total).sum() / (total.sum() + EPS),
            kept_mass(mass, scores.detach(), self._topk),
            evidence_entries(scores.detach(), self._topk),
        )

    @property
    def _topk(self) -> int:
        return min(self.network.spec.index_topk, self.packing.places)

    def _note(self, journal: Journal, seconds: float, steps: int, fits: list[Fit]) -> None:
        losses = [round(fit.loss.item(), 4) for fit in fits]
        kept = [round(fit.kept.item(), 4) for fit in fits]
        evidence = [round(fit.evidence.item(), 2) for fit in fits]
        row = {"phase": "indexer", "seconds": seconds, "steps": steps, "kl": losses, "kept": kept}
        journal.write(
            row | {"evidence": evidence},
            f"{seconds:6.0f}s indexer step {steps} kl {losses} kept of the best {kept} evidence {evidence}",
        )


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
