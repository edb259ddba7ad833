"""DeepSeek-V4: embedding, layers joined by hyper-connections, head. The model's only public entry.

`prefill` takes consecutive tokens of one sequence, `decode` one token of each of many; both write the
sequences' rows, keys, windows and compressor state into the caller's pools. Nothing is kept here but
weights, so any sequence can continue on any transformer of the same weights and geometry. `decode` reads
nothing back to the host and allocates shapes from its arguments only, so it can be captured in a graph.
Call both under `torch.inference_mode`.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvGeometry
from forepage.model.attention import Attended, Attention
from forepage.model.fp32_linear import fp32_linear
from forepage.model.hyper_connections import HyperConnection, HyperHead, expand
from forepage.model.indexer import IndexerTap
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolLayers, PrefillChunk
from forepage.model.moe import MixtureOfExperts
from forepage.model.norm import rms_norm
from forepage.model.prompt_evidence import prompt_evidence
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.rope import RopeFrequencies
from forepage.model.spec import ModelSpec
from forepage.model.step import DecodeStep, PrefillStep
from forepage.model.tensor_parallel import check_split


@dataclass(frozen=True)
class StepOutput:
    """What a step gives for each of its B tokens (prefill: the last one, or all)."""

    logits: Tensor  # f32 [B, vocab]
    hidden: Tensor  # f32 [B, L, D] attention inputs (after attn_norm) at the target layers
    indexer: list[IndexerTap]  # per c4 layer
    pulled_rows: Tensor  # i64 [B] rows pulled from the arena, all layers together
    unserved_rows: Tensor  # i64 [B] selected rows that were neither resident nor pullable: 0 in a sound step
    prompt_evidence: Tensor | None = None  # f32 [blocks] of a prefill that was asked for it
    attention_mass: Sequence[Tensor] = ()  # per c4 layer f32 [n, index_topk], likewise


PrefillParts = Generator[None, None, StepOutput]
"""A chunk that is processed in parts, an attention or a feed-forward each; other steps may come between."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    attn_norm: Tensor
    ffn_norm: Tensor
    attn_streams: HyperConnection
    ffn_streams: HyperConnection
    attention: Attention
    moe: MixtureOfExperts

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], layer: int, spec: ModelSpec, ranks: RankGroup
    ) -> "Layer":
        """Read `layers.{layer}.*`."""
        prefix = f"layers.{layer}."
        return cls(
            attn_norm=weights[f"{prefix}attn_norm.weight"],
            ffn_norm=weights[f"{prefix}ffn_norm.weight"],
            attn_streams=HyperConnection.from_weights(weights, f"{prefix}hc_attn", spec),
            ffn_streams=HyperConnection.from_weights(weights, f"{prefix}hc_ffn", spec),
            attention=Attention.from_weights(weights, layer, spec, ranks),
            moe=MixtureOfExperts.from_weights(weights, f"{prefix}ffn.", spec, ranks),
        )


class Transformer:
    """A model's weights, ready to run. `target_layers` are the layers whose attention inputs are returned.

    One of several ranks computes with its part of the weights; all must take the same steps, in the same
    order, on pools of the same content, and all get the same output.
    """

    def __init__(
        self,
        spec: ModelSpec,
        geometry: KvGeometry,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        target_layers: Sequence[int] = (),
        ranks: RankGroup = ALONE,
    ) -> None:
        """`weights` as `load_or_seed` gives them, of this rank.

        Raises: ModelFormatError for another model's geometry, a target layer the model lacks, or a number
        of ranks that it can't be split over.
        """
        check_split(spec, ranks.num_ranks)
        _check_geometry(spec, geometry)
        unknown = [layer for layer in target_layers if not 0 <= layer < spec.num_layers]
        if unknown:
            raise ModelFormatError(f"target layer {unknown[0]}: the model has {spec.num_layers} layers")
        self.spec = spec
        self.geometry = geometry
        self.device = device
        self.target_layers = tuple(target_layers)
        self._frequencies = RopeFrequencies.from_spec(spec, device)
        self._embedding = weights["embed.weight"]
        self._layers = [Layer.from_weights(weights, layer, spec, ranks) for layer in range(spec.num_layers)]
        self._hyper_head = HyperHead.from_weights(weights, spec)
        self._norm = weights["norm.weight"]
        self._head = weights["head.weight"]

    def decode(self, tokens: Tensor, batch: DecodeBatch, pools: KvPools, arena: Tensor | None) -> StepOutput:
        """Process token i64 [B] of each sequence; `arena` u8 [A] is read where rows must be pulled."""
        step = DecodeStep.plan(batch, self.geometry, self._frequencies)
        layers = PoolLayers(self.geometry, pools)
        record = _Record(self.target_layers, tokens, self.spec.hidden_size)
        streams = self._embed(tokens)  # [B, S, D]
        for layer_idx, layer in enumerate(self._layers):
            x, mix = layer.attn_streams.collapse(streams, layer.attn_norm)
            attended = layer.attention.decode(x, step, layers, arena)
            record.add(layer_idx, x, attended)
            streams = expand(attended.out, streams, mix)
            streams = self._feed_forward(layer, streams, tokens)
        return record.output(self._logits(streams))

    @property
    def num_prefill_parts(self) -> int:
        """Parts of every chunk: the attention and the feed-forward of each layer."""
        return 2 * len(self._layers)

    def prefill(
        self,
        tokens: Tensor,
        chunk: PrefillChunk,
        pools: KvPools,
        *,
        all_logits: bool = False,
        evidence_tokens: int = 0,
        mass_tokens: int = 0,
    ) -> StepOutput:
        """Process tokens i64 [S] of one sequence; the output is the last token's, or every token's.

        `evidence_tokens`: of so many of the last ones `prompt_evidence` says where they looked, in any layer;
        `mass_tokens`: of so many `attention_mass` says what the selected entries got.
        """
        parts = self.prefill_parts(
            tokens,
            chunk,
            pools,
            all_logits=all_logits,
            evidence_tokens=evidence_tokens,
            mass_tokens=mass_tokens,
        )
        output = advance_prefill(parts, self.num_prefill_parts)
        assert output is not None
        return output

    def prefill_parts(
        self,
        tokens: Tensor,
        chunk: PrefillChunk,
        pools: KvPools,
        *,
        all_logits: bool = False,
        evidence_tokens: int = 0,
        mass_tokens: int = 0,
    ) -> PrefillParts:
        """The same part by part, for `advance_prefill`; how many are done at a time does not change a bit.

        Until the last one the sequence is between two tokens: nothing else may step it or change its tables.
        """
        step = PrefillStep.plan(
            chunk, tokens.shape[0], self.geometry, self._frequencies, mass_tokens=mass_tokens
        )
        layers = PoolLayers(self.geometry, pools)
        wanted = slice(None) if all_logits else slice(-1, None)
        record = _Record(self.target_layers, tokens[wanted], self.spec.hidden_size)
        streams = self._embed(tokens)  # [S, streams, D]
        for layer_idx, layer in enumerate(self._layers):
            x, mix = layer.attn_streams.collapse(streams, layer.attn_norm)
            attended = layer.attention.prefill(x, step, layers)
            record.add(layer_idx, x[wanted], attended if all_logits else attended.last())
            if attended.tap is not None and evidence_tokens:
                num_blocks = self.geometry.num_blocks(chunk.start + tokens.shape[0])
                record.add_evidence(prompt_evidence(attended.tap, evidence_tokens, num_blocks))
            streams = expand(attended.out, streams, mix)
            yield
            streams = self._feed_forward(layer, streams, tokens)
            if layer_idx + 1 < len(self._layers):
                yield
        return record.output(self._logits(streams[wanted]))

    def _embed(self, tokens: Tensor) -> Tensor:
        """Every stream starts as the token's embedding: [n] -> [n, S, D]."""
        return F.embedding(tokens, self._embedding).unsqueeze(1).repeat(1, self.spec.hc_mult, 1)

    def _feed_forward(self, layer: Layer, streams: Tensor, tokens: Tensor) -> Tensor:
        x, mix = layer.ffn_streams.collapse(streams, layer.ffn_norm)
        return expand(layer.moe.forward(x, tokens), streams, mix)

    def _logits(self, streams: Tensor) -> Tensor:
        """[n, S, D] -> f32 [n, vocab]."""
        y = self._hyper_head.collapse(streams)
        return fp32_linear(rms_norm(y, self._norm, self.spec.norm_eps), self._head)


def advance_prefill(parts: PrefillParts, num_parts: int) -> StepOutput | None:
    """Do so many parts more, at most those that are left; the chunk's output with the last."""
    try:
        for _ in range(num_parts):
            next(parts)
    except StopIteration as end:
        output: StepOutput = end.value
        return output
    return None


class _Record:
    """Collects what the layers of one step leave for the caller."""

    def __init__(self, target_layers: tuple[int, ...], tokens: Tensor, hidden_size: int) -> None:
        self._target_layers = target_layers
        self._hidden: dict[int, Tensor] = {}
        self._no_hidden = torch.zeros(tokens.shape[0], 0, hidden_size, device=tokens.device)
        self._taps: list[IndexerTap] = []
        self._masses: list[Tensor] = []
        self._pulled = torch.zeros_like(tokens)
        self._unserved = torch.zeros_like(tokens)
        self._evidence: Tensor | None = None

    def add(self, layer: int, x: Tensor, attended: Attended) -> None:
        if layer in self._target_layers:
            self._hidden[layer] = x.float()
        if attended.tap is not None:
            self._taps.append(attended.tap)
        if attended.mass is not None:
            self._masses.append(attended.mass)
        if attended.pulls is not None:
            self._pulled = self._pulled + attended.pulls.pulled
            self._unserved = self._unserved + attended.pulls.unserved

    def add_evidence(self, shares: Tensor) -> None:
        """Of one layer, f32 [blocks]: the largest share in any layer counts."""
        self._evidence = shares if self._evidence is None else torch.maximum(self._evidence, shares)

    def output(self, logits: Tensor) -> StepOutput:
        hidden = [self._hidden[layer] for layer in self._target_layers]
        return StepOutput(
            logits=logits,
            hidden=torch.stack(hidden, dim=1) if hidden else self._no_hidden,
            indexer=self._taps,
            pulled_rows=self._pulled,
            unserved_rows=self._unserved,
            prompt_evidence=self._evidence,
            attention_mass=self._masses,
        )


def _check_geometry(spec: ModelSpec, geometry: KvGeometry) -> None:
    """The pools' sizes must be this model's."""
    ours = (spec.c4_layers, spec.c128_layers, spec.num_layers, spec.head_dim, spec.rope_dims, spec.index_dims)
    theirs = (
        geometry.c4_layers,
        geometry.c128_layers,
        geometry.num_layers,
        geometry.head_dim,
        geometry.rope_dims,
        geometry.index_dims,
    )
    if ours != theirs or spec.window_tokens != geometry.window_tokens:
        raise ModelFormatError(f"KV geometry {theirs} is not that of the model {ours}")
