"""The training network: DeepSeek-V4 as `model/transformer.py` runs it, on packed documents, with gradients.

Masters are fp32; activations have the compute dtype (bf16 on a GPU). Layers of one kind are compiled once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from forepage.kv.geometry import C4_RATIO
from forepage.model.rope import RopeFrequencies, rotation
from forepage.model.spec import ModelSpec
from forepage.training.backbone.attention import Attention
from forepage.training.backbone.experts import Experts
from forepage.training.backbone.maths import rms_norm
from forepage.training.backbone.packing import Packing
from forepage.training.backbone.rows import LayerRows, attend
from forepage.training.backbone.selection import Selection
from forepage.training.backbone.streams import HyperConnection, HyperHead

MAX_KINDS = 64
"""Compiled forms of one function: kinds of layers times numbers of tokens a step."""


@dataclass(frozen=True)
class Inputs:
    """One step's tensors on the device, n packed tokens; filled in place before each step."""

    tokens: Tensor  # i64 [n]
    targets: Tensor  # i64 [n]: the next token
    weights: Tensor  # f32 [n]: of each target in the loss
    kinds: Tensor  # i64 [n]: which task a target of weight 1 belongs to, 0 elsewhere
    decisive: Tensor  # bool [n]: targets that only the right part of the context gives
    positions: Tensor  # i64 [n]
    flattening: Tensor  # f32 [n]
    fp8_share: Tensor  # f32 scalar

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> "Inputs":
        """Zeros of the right shapes."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_tokens, dtype=dtype, device=device)

        return cls(
            tokens=zeros(torch.int64),
            targets=zeros(torch.int64),
            weights=zeros(torch.float32),
            kinds=zeros(torch.int64),
            decisive=zeros(torch.bool),
            positions=zeros(torch.int64),
            flattening=torch.ones(num_tokens, device=device),
            fp8_share=torch.zeros((), device=device),
        )


@dataclass(frozen=True)
class Watched:
    """What one c4 layer attended in a forward pass, without gradients: its indexer learns from it."""

    attention: Attention
    x: Tensor  # [n, D]: attention inputs
    query: Tensor  # [n, H, d]
    stored: Tensor  # [P + n, d]
    lse: Tensor  # f32 [n, H], the sink included
    rows: LayerRows
    chosen: Tensor | None  # bool [n, P]; None: every closed entry


Watch = Callable[[Watched], None]


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.ratio = spec.compress_ratios[layer]
        self.attn_norm = nn.Parameter(torch.empty(spec.hidden_size))
        self.ffn_norm = nn.Parameter(torch.empty(spec.hidden_size))
        self.attn_streams = HyperConnection(spec)
        self.ffn_streams = HyperConnection(spec)
        self.attention = Attention(spec, self.ratio)
        self.experts = Experts(spec, hashed=layer < spec.num_hash_layers)
        self._eps = spec.norm_eps

    def forward(
        self, streams: Tensor, tokens: Tensor, rows: LayerRows, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor]:
        """streams [n, S, D] -> streams, share of choices of each expert f32 [E]."""
        attention = self.attention
        x, post, comb, query, own = self.read(streams, rows.cos, rows.sin, rows.flattening, rows.fp8_share)
        stored = rows.stored(self.entries(x, rows), own)
        visible, chosen = rows.visible, None
        if rows.selection is not None:
            chosen = attention.chosen(x, rows, rows.selection)
            visible = rows.selection.visible(chosen)
        attended, lse = self.attend(query, stored, attention.sink, visible)
        if watch is not None and attention.indexer is not None:
            watch(Watched(attention, x.detach(), query.detach(), stored.detach(), lse.detach(), rows, chosen))
        forced = self.experts.forced(tokens)
        return self.write(streams, post, comb, attended, rows.cos, rows.sin, forced, self.experts.bias)

    def compile_parts(self) -> None:
        """Compile in pieces that layers of all kinds share, cut where nothing could be fused anyway."""
        for name in ("read", "attend", "write"):
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, dynamic=False))
        if self.attention.compressor is not None:
            compressor = self.attention.compressor
            compressor.rows = torch.compile(compressor.rows, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def read(
        self, streams: Tensor, cos: Tensor, sin: Tensor, flattening: Tensor, fp8_share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """streams [n, S, D] -> attention input x [n, D], the way back (post, comb), queries, own rows."""
        x, post, comb = self.attn_streams.collapse(streams)
        x = rms_norm(x, self.attn_norm, self._eps)
        query, own = self.attention.read(x, cos, sin, flattening, fp8_share)
        return x, post, comb, query, own

    def entries(self, x: Tensor, rows: LayerRows) -> Tensor | None:
        """Compressed rows [N, d] of attention inputs x [n, D], if the layer has any."""
        compressor = self.attention.compressor
        if compressor is None:
            return None
        return compressor.rows(x, rows.entry_cos, rows.entry_sin, rows.first_entries, rows.fp8_share)

    def attend(
        self, query: Tensor, stored: Tensor, sink: Tensor, visible: BlockMask | Tensor
    ) -> tuple[Tensor, Tensor]:
        """`rows.attend`."""
        return attend(query, stored, sink, visible)

    def write(
        self,
        streams: Tensor,
        post: Tensor,
        comb: Tensor,
        attended: Tensor,
        cos: Tensor,
        sin: Tensor,
        forced: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The rest of the layer: attention's output and the experts, each back into the streams."""
        streams = self.attn_streams.expand(self.attention.written(attended, cos, sin), streams, post, comb)
        x, post, comb = self.ffn_streams.collapse(streams)
        output, load = self.experts(rms_norm(x, self.ffn_norm, self._eps), forced, bias)
        return self.ffn_streams.expand(output, streams, post, comb), load


class Head(nn.Module):
    """The last collapse, norm and vocabulary."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.streams = HyperHead(spec)
        self.norm = nn.Parameter(torch.empty(spec.hidden_size))
        self.weight = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
        self._eps = spec.norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        """streams [n, S, D] -> logits f32 [n, vocab]."""
        y = rms_norm(self.streams.collapse(streams), self.norm, self._eps)
        return F.linear(y.float(), self.weight)

    def losses(self, streams: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy f32 [n] of the targets, and whether each is the likeliest token, bool [n]."""
        logits = self(streams)
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


class Backbone(nn.Module):
    """Embedding, layers, head. Parameters are not initialised here (`initial.py`)."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        with device:
            self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
            self.layers = nn.ModuleList(Layer(spec, layer) for layer in range(spec.num_layers))
            self.head = Head(spec)
        self._frequencies = RopeFrequencies.from_spec(spec, device)

    def compile_layers(self) -> None:
        """Compile every layer and the head's loss in place; layers share the code."""
        torch._dynamo.config.recompile_limit = MAX_KINDS
        for layer in self._layers():
            layer.compile_parts()
        self.head.losses = torch.compile(self.head.losses, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def forward(
        self, inputs: Inputs, packing: Packing, *, sparse: bool = False, watch: Watch | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Streams [n, S, D] after the last layer, and every layer's share of expert choices.

        `sparse`: c4 layers attend the entries that their indexers choose, as when served; else all closed
        ones. `watch` is called once for each c4 layer.
        """
        rows = self.rows(inputs, packing, sparse=sparse)
        streams, loads = self.embedded(inputs.tokens), []
        for layer in self._layers():
            streams, load = layer(streams, inputs.tokens, rows[layer.ratio], watch)
            loads.append(load)
        return streams, loads

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens i64 [n] -> [n, S, D]: every stream starts as the embedding."""
        # As a product: its gradient is one too, where a lookup's would sort tens of thousands of few ids.
        one_hot = tokens.unsqueeze(1) == torch.arange(self.spec.vocab_size, device=tokens.device)
        x = one_hot.to(self.dtype) @ self.embedding.to(self.dtype)
        return x.unsqueeze(1).expand(-1, self.spec.hc_mult, -1).contiguous()

    def _layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def rows(self, inputs: Inputs, packing: Packing, *, sparse: bool = False) -> Mapping[int, LayerRows]:
        """What layers of each ratio attend."""
        rows = {ratio: self._rows(ratio, inputs, packing) for ratio in set(self.spec.compress_ratios)}
        if sparse and C4_RATIO in rows:
            selection = Selection(packing, self.spec.index_topk)
            rows[C4_RATIO] = replace(rows[C4_RATIO], selection=selection)
        return rows

    def _rows(self, ratio: int, inputs: Inputs, packing: Packing) -> LayerRows:
        frequencies = self._frequencies.compressed if ratio else self._frequencies.window
        own = rotation(inputs.positions, frequencies)
        step = ratio or packing.num_tokens
        return LayerRows(
            cos=own.cos,
            sin=own.sin,
            entry_cos=own.cos[::step].contiguous(),
            entry_sin=own.sin[::step].contiguous(),
            first_entries=packing.first_entries(step),
            flattening=inputs.flattening,
            fp8_share=inputs.fp8_share,
            places=packing.places,
            visible=packing.visible(ratio),
        )
