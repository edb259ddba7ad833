"""`transformers`' DeepSeek-V4 with our weights: an implementation that shares nothing with ours.

It attends densely with a mask, keeps no paged pools and rounds nothing, so our fp32 KV format is compared
with it. One run over a text serves every prefix of it: the model is causal. It also says which entries its
indexers and which experts its gates selected: at a near-tie rounding decides, and what was flipped then
differs ever after.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Tokens the oracle takes at once; it holds [tokens, heads, rows] of fp32."""

ATTENTION_NAMES = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
COMPRESSOR_NAMES = {
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
    "position_bias": "ape",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


@dataclass(frozen=True)
class Choices:
    """Scores f32 [S, N] of a text of S tokens, and what was selected by them: bool [S, N].

    N: the entries of an indexer, or the experts of a gate.
    """

    scores: Tensor
    selected: Tensor


@dataclass(frozen=True)
class OracleRun:
    """Logits f32 [S, vocab], each c4 layer's choices of entries, each scored layer's choices of experts."""

    logits: Tensor
    choices: list[Choices]
    routing: list[Choices]


def run_oracle(config: Mapping[str, object], weights: Mapping[str, Tensor], tokens: Tensor) -> OracleRun:
    """Build it, set every tensor by name, and run it over tokens i64 [S], in chunks with its own cache."""
    return run_built(_build(config, weights), tokens)


def run_built(oracle: Any, tokens: Tensor) -> OracleRun:
    """Run it over tokens i64 [S]."""
    scorers = _outputs_of(oracle, "indexer.scorer")
    indexers = _outputs_of(oracle, "indexer")
    routers = _routers_of(oracle)
    logits, cache = [], None
    with torch.inference_mode():
        for chunk in tokens.split(CHUNK):
            output = oracle(chunk.unsqueeze(0), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0])
    shape = (tokens.shape[0], tokens.shape[0] // 4)
    choices = [
        _choices(scores, selected, shape)
        for scores, selected in zip(scorers.values(), indexers.values(), strict=True)
    ]
    routing = [_routing(router, chunks) for router, chunks in routers]
    return OracleRun(torch.cat(logits), choices, routing)


def read_by_oracle(folder: Path) -> Any:
    """The oracle as its own loader reads a folder in the release's format, dequantised, then in fp32.

    bf16 is what the release's config asks for, and loses nothing of it. Sides of quantised matrices must be
    multiples of 128, or below: it divides a matrix evenly among its scales.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

        oracle = DeepseekV4ForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            quantization_config=FineGrainedFP8Config(dequantize=True),
        )
    return oracle.float().eval()


def oracle_tensor(name: str, weights: Mapping[str, Tensor], num_experts: int) -> Tensor:
    """The value of one tensor of the oracle's state dict."""
    if name in TOP_NAMES:
        return weights[TOP_NAMES[name]]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    prefix = f"layers.{layer}."
    if rest in ATTENTION_NAMES:
        return weights[prefix + ATTENTION_NAMES[rest]]
    for theirs, ours in (
        ("self_attn.compressor.indexer.", "attn.indexer.compressor."),
        ("self_attn.compressor.", "attn.compressor."),
    ):
        if rest.startswith(theirs):
            return weights[prefix + ours + COMPRESSOR_NAMES[rest.removeprefix(theirs)]]
    site, _, parameter = rest.partition("_hc.")
    if parameter:
        return weights[f"{prefix}hc_{site}_{parameter}"]
    experts = [f"{prefix}ffn.experts.{e}." for e in range(num_experts)]
    if rest == "mlp.experts.gate_up_proj":
        return torch.stack([torch.cat([weights[f"{e}{w}.weight"] for w in ("w1", "w3")]) for e in experts])
    assert rest == "mlp.experts.down_proj"
    return torch.stack([weights[f"{e}w2.weight"] for e in experts])


def _build(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers' own imports
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        oracle = DeepseekV4ForCausalLM(DeepseekV4Config(**config, attn_implementation="eager")).eval()
    num_experts = int(str(config["n_routed_experts"]))
    oracle.load_state_dict({name: oracle_tensor(name, weights, num_experts) for name in oracle.state_dict()})
    return oracle


def _outputs_of(oracle: Any, suffix: str) -> dict[str, list[Tensor]]:
    """Collects what modules of that name return, [S, *] for each chunk, by layer in order."""
    outputs: dict[str, list[Tensor]] = {}
    for name, module in oracle.named_modules():
        if name.endswith(suffix):
            collected = outputs.setdefault(name, [])
            module.register_forward_hook(lambda _module, _inputs, out, to=collected: to.append(out[0]))
    return outputs


def _routers_of(oracle: Any) -> list[tuple[Any, list[tuple[Tensor, ...]]]]:
    """The gates that score, in order, each with its outputs: logits [S, E], weights, experts [S, k]."""
    routers = []
    for module in oracle.modules():
        if hasattr(module, "e_score_correction_bias"):
            collected: list[tuple[Tensor, ...]] = []
            module.register_forward_hook(lambda _module, _inputs, out, to=collected: to.append(out))
            routers.append((module, collected))
    return routers


def _routing(router: Any, chunks: list[tuple[Tensor, ...]]) -> Choices:
    logits, _, experts = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    scores = router.score_fn(logits) + router.e_score_correction_bias
    chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, experts, True)
    return Choices(scores, chosen)


def _choices(scores: list[Tensor], selected: list[Tensor], shape: tuple[int, int]) -> Choices:
    """Chunks [s, n] of scores and [s, k] of entries (negative: none) -> whole text."""
    all_scores = torch.full(shape, float("-inf"))
    chosen = torch.zeros(shape[0], shape[1] + 1, dtype=torch.bool)
    first = 0
    for part, entries in zip(scores, selected, strict=True):
        rows = slice(first, first + part.shape[0])
        all_scores[rows, : part.shape[1]] = part
        chosen[rows].scatter_(1, torch.where(entries >= 0, entries, shape[1]), True)
        first = rows.stop
    return Choices(all_scores, chosen[:, : shape[1]])
