"""DeepSeek-V4 written straight from its equations: fp64, one text at a time, no cache, no code of ours.

Where the reference simulates its quantised cache (rows in FP8, index keys and queries in FP4), the model
calls `Rounding`; by default that changes nothing, and the result is the unquantised model's.
Source: reference inference code of DeepSeek-V4, order of operations and constants.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Rounding(Protocol):
    """What becomes of values on their way into the cache: x [n, d] (queries [S, H, d]) -> the same shape."""

    def window_rows(self, layer: int, x: Tensor) -> Tensor:
        """The tokens' own rows, after RoPE."""
        ...

    def compressed_rows(self, layer: int, x: Tensor) -> Tensor:
        """Pooled rows, after norm and RoPE."""
        ...

    def index_keys(self, layer: int, x: Tensor) -> Tensor:
        """Pooled indexer keys, after norm and RoPE."""
        ...

    def index_queries(self, layer: int, x: Tensor) -> Tensor:
        """Indexer queries, after RoPE."""
        ...


class NoRounding:
    """An unquantised cache."""

    def window_rows(self, layer: int, x: Tensor) -> Tensor:
        """As they are."""
        del layer
        return x

    compressed_rows = index_keys = index_queries = window_rows


@dataclass
class PlainModel:
    """`run` gives logits [S, vocab]; index scores [S, N] of each c4 layer are left in `scores`."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    rounding: Rounding = field(default_factory=NoRounding)
    scores: list[Tensor] = field(default_factory=list)

    def run(self, tokens: Tensor) -> Tensor:
        """tokens i64 [S]; no more than index_topk entries, so that nothing is selected away."""
        assert tokens.shape[0] // 4 <= self.config["index_topk"]
        streams = self._w("embed.weight")[tokens].unsqueeze(1).repeat(1, self.config["hc_mult"], 1)
        for layer in range(self.config["num_hidden_layers"]):
            x, post, comb = self._collapse(streams, f"layers.{layer}.hc_attn")
            y = self._attention(layer, self._norm(x, f"layers.{layer}.attn_norm"))
            streams = post.unsqueeze(2) * y.unsqueeze(1) + torch.einsum("tjk,tjd->tkd", comb, streams)
            x, post, comb = self._collapse(streams, f"layers.{layer}.hc_ffn")
            y = self._experts(f"layers.{layer}.ffn.", self._norm(x, f"layers.{layer}.ffn_norm"), tokens)
            streams = post.unsqueeze(2) * y.unsqueeze(1) + torch.einsum("tjk,tjd->tkd", comb, streams)
        mixed = self._mixed(streams, "hc_head") * self._w("hc_head_scale") + self._w("hc_head_base")
        weights = torch.sigmoid(mixed) + self.config["hc_eps"]
        return self._norm((weights.unsqueeze(2) * streams).sum(1), "norm") @ self._w("head.weight").T

    def _w(self, name: str) -> Tensor:
        return self.weights[name].double()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return unit(x, self.config["rms_norm_eps"]) * self._w(f"{name}.weight")

    def _mixed(self, streams: Tensor, name: str) -> Tensor:
        return unit(streams.flatten(1), self.config["rms_norm_eps"]) @ self._w(f"{name}_fn").T

    def _collapse(self, streams: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [S, m, D] -> sublayer input [S, D], post [S, m], doubly stochastic comb [S, m, m]."""
        m, eps = self.config["hc_mult"], self.config["hc_eps"]
        pre, post, comb = self._mixed(streams, name).split([m, m, m * m], dim=1)
        base, scale = self._w(f"{name}_base").split([m, m, m * m]), self._w(f"{name}_scale")
        weights = torch.sigmoid(pre * scale[0] + base[0]) + eps
        square = torch.softmax((comb * scale[2] + base[2]).view(-1, m, m), dim=2) + eps
        square = square / (square.sum(1, keepdim=True) + eps)
        for _ in range(self.config["hc_sinkhorn_iters"] - 1):
            square = square / (square.sum(2, keepdim=True) + eps)
            square = square / (square.sum(1, keepdim=True) + eps)
        x = (weights.unsqueeze(2) * streams).sum(1)
        return x, 2 * torch.sigmoid(post * scale[1] + base[1]), square

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        config, name, ratio = self.config, f"layers.{layer}.attn.", self.config["compress_ratios"][layer]
        heads, dims, length = config["num_attention_heads"], config["head_dim"], x.shape[0]
        at = torch.arange(length)
        latent = self._norm(x @ self._w(f"{name}wq_a.weight").T, f"{name}q_norm")
        q = unit((latent @ self._w(f"{name}wq_b.weight").T).view(length, heads, dims), config["rms_norm_eps"])
        q = self._turn(q, at, ratio)
        own = self._turn(self._norm(x @ self._w(f"{name}wkv.weight").T, f"{name}kv_norm"), at, ratio)
        rows = self.rounding.window_rows(layer, own)
        age = at.unsqueeze(1) - at
        mask = (age >= 0) & (age < config["sliding_window"])
        if ratio:
            if ratio == 4:
                self.scores.append(self._index_scores(layer, x, latent))
            pooled = self.rounding.compressed_rows(layer, self._pool(f"{name}compressor.", x, ratio))
            closed = (at.unsqueeze(1) + 1) // ratio > torch.arange(pooled.shape[0])
            rows, mask = torch.cat((rows, pooled)), torch.cat((mask, closed), dim=1)
        scores = torch.einsum("thd,nd->thn", q, rows) * dims**-0.5
        scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
        sink = self._w(f"{name}attn_sink").view(1, -1, 1).expand(length, -1, 1)
        p = torch.softmax(torch.cat((scores, sink), dim=2), dim=2)[..., :-1]
        out = self._turn(torch.einsum("thn,nd->thd", p, rows), at, ratio, back=True)
        grouped = out.reshape(length, config["o_groups"], -1)
        wo_a = self._w(f"{name}wo_a.weight").view(config["o_groups"], config["o_lora_rank"], -1)
        return torch.einsum("tgi,gri->tgr", grouped, wo_a).flatten(1) @ self._w(f"{name}wo_b.weight").T

    def _index_scores(self, layer: int, x: Tensor, latent: Tensor) -> Tensor:
        name, at = f"layers.{layer}.attn.indexer.", torch.arange(x.shape[0])
        heads, dims = int(self.config["index_n_heads"]), int(self.config["index_head_dim"])
        q = (latent @ self._w(f"{name}wq_b.weight").T).view(-1, heads, dims)
        q = self.rounding.index_queries(layer, self._turn(q, at, 4))
        keys = self.rounding.index_keys(layer, self._pool(f"{name}compressor.", x, 4))
        weights = (x @ self._w(f"{name}weights_proj.weight").T) / math.sqrt(dims * heads)
        return (torch.einsum("thd,nd->thn", q, keys).relu() * weights.unsqueeze(2)).sum(1)

    def _pool(self, name: str, x: Tensor, ratio: int) -> Tensor:
        """x [S, D] -> closed entries [S // ratio, d], one entry at a time."""
        kv = x @ self._w(f"{name}wkv.weight").T
        gate = x @ self._w(f"{name}wgate.weight").T + self._w(f"{name}ape")[torch.arange(len(x)) % ratio]
        dims, entries = self.weights[f"{name}norm.weight"].shape[0], x.shape[0] // ratio
        pooled = torch.zeros(entries, dims, dtype=torch.float64)
        for w in range(entries):
            own = slice(w * ratio, (w + 1) * ratio)
            values, gates = kv[own, -dims:], gate[own, -dims:]
            if ratio == 4 and w > 0:
                before = slice((w - 1) * ratio, w * ratio)
                values = torch.cat((kv[before, :dims], values))
                gates = torch.cat((gate[before, :dims], gates))
            pooled[w] = (torch.softmax(gates, dim=0) * values).sum(0)
        return self._turn(self._norm(pooled, f"{name}norm"), torch.arange(entries) * ratio, ratio)

    def _turn(self, x: Tensor, at: Tensor, ratio: int, *, back: bool = False) -> Tensor:
        """RoPE as complex numbers on the trailing dims; angles are fp32 products, as the reference's."""
        rope = self.config["qk_rope_head_dim"]
        angle = (at.float().unsqueeze(1) * self._frequencies(ratio)).double()
        turn = torch.polar(torch.ones_like(angle), -angle if back else angle)
        turn = turn.view(len(at), *[1] * (x.dim() - 2), rope // 2)
        pairs = torch.view_as_complex(x[..., -rope:].reshape(*x.shape[:-1], rope // 2, 2).contiguous())
        return torch.cat((x[..., :-rope], torch.view_as_real(pairs * turn).flatten(-2)), dim=-1)

    def _frequencies(self, ratio: int) -> Tensor:
        """fp32 [rope / 2]; YaRN only where rows are compressed."""
        rope = int(self.config["qk_rope_head_dim"])
        theta = float(self.config["compress_rope_theta" if ratio else "rope_theta"])
        plain = 1.0 / theta ** (torch.arange(0, rope, 2, dtype=torch.float32) / rope)
        if not ratio:
            return plain
        yarn = self.config["rope_scaling"]

        def pair(turns: float) -> float:
            per_turn = float(yarn["original_max_position_embeddings"]) / (turns * 2 * math.pi)
            return rope * math.log(per_turn) / (2 * math.log(theta))

        low, high = max(math.floor(pair(yarn["beta_fast"])), 0), math.ceil(pair(yarn["beta_slow"]))
        ramp = ((torch.arange(rope // 2, dtype=torch.float32) - low) / (min(high, rope - 1) - low)).clamp(
            0, 1
        )
        return plain / float(yarn["factor"]) * ramp + plain * (1 - ramp)

    def _experts(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        scores = F.softplus(x @ self._w(f"{name}gate.weight").T).sqrt()
        if f"{name}gate.tid2eid" in self.weights:
            chosen = self.weights[f"{name}gate.tid2eid"][tokens]
        else:
            chosen = (scores + self._w(f"{name}gate.bias")).topk(self.config["num_experts_per_tok"]).indices
        share = scores.gather(1, chosen)
        share = share / share.sum(1, keepdim=True) * float(self.config["routed_scaling_factor"])
        outputs = torch.stack(
            [self._expert(f"{name}experts.{e}.", x) for e in range(self.config["n_routed_experts"])], dim=1
        )  # [S, E, D]
        routed = outputs.gather(1, chosen.unsqueeze(2).expand(-1, -1, x.shape[1]))
        return (routed * share.unsqueeze(2)).sum(1) + self._expert(f"{name}shared_experts.", x)

    def _expert(self, name: str, x: Tensor) -> Tensor:
        limit = self.config["swiglu_limit"]
        gate = (x @ self._w(f"{name}w1.weight").T).clamp(max=limit)
        up = (x @ self._w(f"{name}w3.weight").T).clamp(-limit, limit)
        return (F.silu(gate) * up) @ self._w(f"{name}w2.weight").T


def unit(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
