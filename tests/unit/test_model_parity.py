"""Our transformer against the independent implementation in `transformers`, fp32, one small config.

The oracle attends densely with a mask, keeps no paged pools and rounds nothing, so the fp32 KV format is
compared with it. Logits have unit scale; the oracle itself differs by up to 7e-6 between its own paths.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import StepOutput, Transformer
from forepage.model.weights import seeded_weights

ATOL = 2e-5
TIE_MARGIN = 1e-5
"""Scores closer than this may be ordered either way (rounding differs), so selections may differ there."""
NUM_TOKENS = 700
SEED = 9
"""With it no selection below has a near-tie, so nothing hangs on one machine's rounding."""
CPU = torch.device("cpu")

CONFIG: dict[str, object] = {
    "model_type": "deepseek_v4",
    "vocab_size": 300,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 128,
    "compress_ratios": [0, 128, 4, 128, 4, 0, 0],
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 256,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}

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


def oracle_tensor(name: str, weights: dict[str, Tensor], num_experts: int) -> Tensor:
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


@dataclass
class Subject:
    """Our model and the oracle with the same weights, one text, and the oracle's logits for all of it."""

    transformer: Transformer
    oracle: Any
    tokens: Tensor
    expected: Tensor

    @classmethod
    def build(cls, index_topk: int) -> "Subject":
        config = {**CONFIG, "index_topk": index_topk}
        spec = ModelSpec.from_config(config)
        weights = seeded_weights(spec, SEED, dtype=torch.float32, device=CPU)
        geometry = KvGeometry.from_config(config, KvFormat.FP32)
        tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(SEED))
        oracle = build_oracle(config, weights)
        with torch.inference_mode():
            expected = oracle(tokens.unsqueeze(0)).logits[0]
        return cls(Transformer(spec, geometry, weights, CPU), oracle, tokens, expected)

    def pools(self, num_sequences: int) -> KvPools:
        """Pools for that many whole texts, NaN wherever nothing was stored."""
        blocks = num_sequences * self.num_blocks
        capacity = PoolCapacity(num_sequences, row_blocks=blocks, key_blocks=blocks, c128_blocks=blocks)
        return KvPools.poisoned(self.transformer.geometry, capacity, CPU)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole text."""
        return self.transformer.geometry.num_blocks(NUM_TOKENS)

    def table(self, sequence: int) -> Tensor:
        """A sequence's block table: its blocks in reverse, so that order in the pool means nothing."""
        last = (sequence + 1) * self.num_blocks
        return torch.arange(last - 1, last - 1 - self.num_blocks, -1, dtype=torch.int32)

    def prefill(
        self, pools: KvPools, num_tokens: int, *, chunk: int = NUM_TOKENS, sequence: int = 0
    ) -> list[StepOutput]:
        """Every token's output, chunk by chunk."""
        table = self.table(sequence)
        outputs = []
        for start in range(0, num_tokens, chunk):
            part = self.tokens[start : min(start + chunk, num_tokens)]
            place = PrefillChunk(sequence, start, table, table, table)
            outputs.append(self.transformer.prefill(part, place, pools, all_logits=True))
        return outputs

    def decode(self, pools: KvPools, positions: list[int]) -> Tensor:
        """Logits of one step that processes the text's token at each sequence's position."""
        tables = torch.stack([self.table(sequence) for sequence in range(len(positions))])
        batch = DecodeBatch(
            slots=torch.arange(len(positions)),
            positions=torch.tensor(positions),
            row_table=tables,
            key_table=tables,
            c128_table=tables,
            staging=torch.full((len(positions), self.transformer.spec.index_topk // 64), -1),
            arena_offsets=torch.full(tables.shape, -1),
        )
        return self.transformer.decode(self.tokens[positions], batch, pools, None).logits


def build_oracle(config: dict[str, object], weights: dict[str, Tensor]) -> Any:
    """`transformers`' model with our weights; every tensor of it is set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers' own imports
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        oracle = DeepseekV4ForCausalLM(DeepseekV4Config(**config, attn_implementation="eager")).eval()
    num_experts = int(str(config["n_routed_experts"]))
    state = {name: oracle_tensor(name, weights, num_experts) for name in oracle.state_dict()}
    oracle.load_state_dict(state)
    return oracle


@pytest.fixture(scope="module")
def everything_selected() -> Subject:
    """index_topk above the number of entries: no selection, so no ties."""
    return Subject.build(index_topk=256)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_prefill_at_once_equals_the_oracle(everything_selected: Subject) -> None:
    [output] = everything_selected.prefill(everything_selected.pools(1), NUM_TOKENS)
    torch.testing.assert_close(output.logits, everything_selected.expected, atol=ATOL, rtol=0)
    assert 0.5 < everything_selected.expected.std() < 2


@pytest.mark.parametrize("chunk", [7, 64, 100, 256])
def test_prefill_in_chunks_equals_the_oracle(everything_selected: Subject, chunk: int) -> None:
    outputs = everything_selected.prefill(everything_selected.pools(1), NUM_TOKENS, chunk=chunk)
    logits = torch.cat([output.logits for output in outputs])
    torch.testing.assert_close(logits, everything_selected.expected, atol=ATOL, rtol=0)


def test_batched_decode_equals_the_oracle(everything_selected: Subject) -> None:
    prompts, num_steps = [1, 255, 510], 135
    pools = everything_selected.pools(len(prompts))
    for sequence, prompt in enumerate(prompts):
        everything_selected.prefill(pools, prompt, sequence=sequence)
    for step in range(num_steps):
        positions = [prompt + step for prompt in prompts]
        logits = everything_selected.decode(pools, positions)
        torch.testing.assert_close(logits, everything_selected.expected[positions], atol=ATOL, rtol=0)


def test_decode_alone_equals_the_oracle_from_the_first_token(everything_selected: Subject) -> None:
    pools = everything_selected.pools(1)
    for position in range(20):
        logits = everything_selected.decode(pools, [position])
        torch.testing.assert_close(logits[0], everything_selected.expected[position], atol=ATOL, rtol=0)


def test_selection_equals_the_oracle_up_to_near_ties() -> None:
    """The selected sets agree at every token whose margin exceeds rounding, and so do its logits.

    A set that differs at a near-tie changes later rows, so the comparison ends there.
    """
    subject = Subject.build(index_topk=32)
    scores = oracle_scores(subject)
    [output] = subject.prefill(subject.pools(1), NUM_TOKENS)
    same = NUM_TOKENS
    for layer_scores, tap in zip(scores, output.indexer, strict=True):
        same = min(same, first_difference(layer_scores, tap.selected))
    assert same > NUM_TOKENS - 100, "selection is active from token 131 on"
    torch.testing.assert_close(output.logits[:same], subject.expected[:same], atol=ATOL, rtol=0)


def test_decode_with_selection_equals_the_oracle() -> None:
    subject = Subject.build(index_topk=32)
    pools, prompt = subject.pools(1), 420
    subject.prefill(pools, prompt, chunk=100)
    for position in range(prompt, prompt + 40):
        logits = subject.decode(pools, [position])
        torch.testing.assert_close(logits[0], subject.expected[position], atol=ATOL, rtol=0)


def oracle_scores(subject: Subject) -> list[Tensor]:
    """The oracle's indexer scores of the whole text, [S, N] for each c4 layer."""
    scores: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: scores.append(out[0]))
        for name, module in subject.oracle.named_modules()
        if name.endswith("indexer.scorer")
    ]
    subject.oracle(subject.tokens.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return scores


def first_difference(scores: Tensor, selected: Tensor) -> int:
    """First token whose selected set is not the oracle's top-k: scores [S, N], selected [S, k] -> index or S.

    Asserts that the scores which decided it were a near-tie.
    """
    num_tokens, topk = selected.shape
    for token in range(num_tokens):
        visible = scores[token, : (token + 1) // 4]
        ours = {entry for entry in selected[token].tolist() if entry >= 0}
        if len(visible) <= topk:
            assert ours == set(range(len(visible)))
            continue
        ranked = visible.sort(descending=True)
        if ours != set(ranked.indices[:topk].tolist()):
            assert ranked.values[topk - 1] - ranked.values[topk] < TIE_MARGIN, f"token {token}"
            return token
    return num_tokens
