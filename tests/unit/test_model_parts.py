"""The model's parts against equations written out the slow way, one element at a time where it helps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import forepage.model
from forepage.kv.geometry import C4_RATIO, C128_RATIO
from forepage.model.compressor import Compressor, EntryTarget
from forepage.model.experts import DENSE_EXPERTS
from forepage.model.hyper_connections import HyperConnection, HyperHead, expand
from forepage.model.indexer import Indexer, IndexerQuery
from forepage.model.moe import MixtureOfExperts
from forepage.model.norm import rms_norm
from forepage.model.rope import RopeFrequencies, inverse_frequencies, rotation, yarn_frequencies
from forepage.model.spec import ModelSpec, read_config
from forepage.model.weights import seeded_weights
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool, hadamard, load_rows, store_rows
from forepage_kernels.prefill_attention.reference import (
    attend_masked,
    closed_mask,
    selection_mask,
    window_mask,
)

CPU = torch.device("cpu")
CONFIG = read_config(Path(forepage.model.__file__).parent / "bundled" / "seeded")
SPEC = ModelSpec.from_config(CONFIG)
WEIGHTS = seeded_weights(SPEC, 3, dtype=torch.float32, device=CPU)
FREQUENCIES = RopeFrequencies.from_spec(SPEC, CPU)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def test_rope_multiplies_trailing_pairs_as_complex_numbers() -> None:
    x, positions = torch.randn(5, 96), torch.tensor([0, 1, 17, 1000, 4095])
    turn = rotation(positions, FREQUENCIES.window)
    angle = positions[:, None].double() * FREQUENCIES.window.double()
    pairs = torch.view_as_complex(x[:, 32:].double().reshape(5, 32, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)
    rotated = turn.apply(x)
    assert torch.equal(rotated[:, :32], x[:, :32])
    torch.testing.assert_close(rotated[:, 32:], expected.float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(turn.undo(rotated), x, atol=1e-6, rtol=0)


def test_rope_angles_are_fp32_products() -> None:
    position, pair = 1_048_575, 3
    turn = rotation(torch.tensor([position]), FREQUENCIES.compressed)
    angle = torch.tensor(float(position)) * FREQUENCIES.compressed[pair]
    assert angle.dtype == torch.float32
    torch.testing.assert_close(turn.cos[0, pair], angle.cos(), atol=1e-6, rtol=0)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain = inverse_frequencies(64, 160000.0)
    yarn = yarn_frequencies(64, 160000.0, SPEC.yarn)
    assert torch.equal(yarn[:16], plain[:16])
    torch.testing.assert_close(yarn[25:], plain[25:] / 16)
    ramp = (20 - 15) / 10
    torch.testing.assert_close(yarn[20], plain[20] / 16 * ramp + plain[20] * (1 - ramp))


def test_rms_norm_casts_once() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.rand(64).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert torch.equal(rms_norm(x, weight, 1e-6), expected.float().bfloat16())


def test_hyper_connection_follows_its_equations() -> None:
    site = HyperConnection.from_weights(WEIGHTS, "layers.3.hc_attn", SPEC)
    streams, output = torch.randn(1, 4, SPEC.hidden_size), torch.randn(1, SPEC.hidden_size)
    x, mix = site.collapse(streams)
    mixed = streams.flatten().double()
    mixed = site.fn.double() @ mixed / (mixed.square().mean() + SPEC.norm_eps).sqrt()
    scale, base = site.how.scale, site.how.base
    pre = torch.sigmoid(mixed[:4] * scale[0] + base[:4]) + SPEC.hc_eps
    post = 2 * torch.sigmoid(mixed[4:8] * scale[1] + base[4:8])
    comb = torch.softmax((mixed[8:] * scale[2] + base[8:]).view(4, 4), dim=1) + SPEC.hc_eps
    for turn in range(2 * SPEC.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(turn % 2, keepdim=True) + SPEC.hc_eps)
    torch.testing.assert_close(x[0], (pre @ streams[0].double()).float(), atol=1e-5, rtol=0)
    expanded = expand(output, streams, mix)[0]
    for k in range(4):
        expected = post[k] * output[0] + sum(comb[j, k] * streams[0, j] for j in range(4))
        torch.testing.assert_close(expanded[k], expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(mix.comb.sum(1), torch.ones(1, 4), atol=1e-4, rtol=0)


def test_hyper_head_weighs_streams_without_mixing() -> None:
    head = HyperHead.from_weights(WEIGHTS, SPEC)
    streams = torch.randn(2, 4, SPEC.hidden_size)
    for token in range(2):
        flat = streams[token].flatten()
        mixed = head.fn @ flat / (flat.square().mean() + SPEC.norm_eps).sqrt()
        weights = torch.sigmoid(mixed * head.scale + head.base) + SPEC.hc_eps
        torch.testing.assert_close(head.collapse(streams)[token], weights @ streams[token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_experts", [4, DENSE_EXPERTS + 1], ids=["dense", "grouped"])
@pytest.mark.parametrize("layer", [0, 3], ids=["hash", "score"])
def test_experts_equal_a_loop_over_tokens(num_experts: int, layer: int) -> None:
    spec = ModelSpec.from_config({**CONFIG, "n_routed_experts": num_experts, "swiglu_limit": 0.5})
    weights = seeded_weights(spec, 1, dtype=torch.float32, device=CPU)
    prefix = f"layers.{layer}.ffn."
    moe = MixtureOfExperts.from_weights(weights, prefix, spec)
    x, tokens = torch.randn(9, spec.hidden_size), torch.randint(spec.vocab_size, (9,))
    outputs = moe.forward(x, tokens)
    for i in range(9):
        scores = F.softplus(weights[f"{prefix}gate.weight"] @ x[i]).sqrt()
        if layer == 0:
            chosen = weights[f"{prefix}gate.tid2eid"][tokens[i]]
        else:
            chosen = (scores + weights[f"{prefix}gate.bias"]).topk(2).indices
        share = scores[chosen] / scores[chosen].sum() * spec.routed_scale
        expected = clamped_swiglu(weights, f"{prefix}shared_experts.", x[i], limit=0.5)
        for expert, part in zip(chosen.tolist(), share, strict=True):
            expected = expected + part * clamped_swiglu(
                weights, f"{prefix}experts.{expert}.", x[i], limit=0.5
            )
        torch.testing.assert_close(outputs[i], expected, atol=1e-5, rtol=0)


def clamped_swiglu(weights: dict[str, Tensor], prefix: str, x: Tensor, *, limit: float) -> Tensor:
    """One expert on one token."""
    gate = (weights[f"{prefix}w1.weight"] @ x).clamp(max=limit)
    up = (weights[f"{prefix}w3.weight"] @ x).clamp(-limit, limit)
    return weights[f"{prefix}w2.weight"] @ (F.silu(gate) * up)


def expected_entry(compressor: Compressor, x: Tensor, entry: int) -> Tensor:
    """Entry `entry` of a text whose compressor inputs are x [S, D], in fp64 and token by token."""
    ratio, dims = compressor.ratio, compressor.dims
    w_kv, w_gate = compressor.w_kv_gate.double().chunk(2)
    kvs, gates = [], []
    first = ratio * (entry - 1) if compressor.overlaps else ratio * entry
    for token in range(max(first, 0), ratio * (entry + 1)):
        own = token >= ratio * entry
        half = slice(dims, 2 * dims) if compressor.overlaps and own else slice(0, dims)
        kvs.append((w_kv @ x[token].double())[half])
        gates.append((w_gate @ x[token].double() + compressor.position_bias[token % ratio])[half])
    pooled = (torch.softmax(torch.stack(gates), dim=0) * torch.stack(kvs)).sum(0)
    normed = pooled / (pooled.square().mean() + SPEC.norm_eps).sqrt() * compressor.norm
    turn = rotation(torch.tensor([entry * ratio]), FREQUENCIES.compressed)
    return turn.apply(normed.float().unsqueeze(0))[0]


def compress(compressor: Compressor, x: Tensor, chunks: list[int], ring: int) -> Tensor:
    """All entries of x [S, D]: the chunk lengths given, 1 = a decode step. State and pool start as NaN."""
    width = compressor.position_bias.shape[1]
    num_entries = x.shape[0] // compressor.ratio
    layout = RowLayout(4, compressor.dims - SPEC.rope_dims, SPEC.rope_dims, "fp32")
    pool_bytes = torch.full((1 + num_entries // 4, layout.plane_bytes), 0xFF, dtype=torch.uint8)
    pool = RowPool(pool_bytes, 0, layout)
    state = torch.full((2, 2, ring, width), float("nan"))
    start = 0
    for length in chunks:
        ratio, end = compressor.ratio, start + length
        if length == 1:
            entry = start // ratio if end % ratio == 0 else -1
            turn = rotation(torch.tensor([start - start % ratio]), FREQUENCIES.compressed)
            target = EntryTarget(pool, torch.tensor([entry]), turn)
            at = {"slots": torch.tensor([1]), "positions": torch.tensor([start])}
            compressor.decode(x[start:end], state, target, **at)
        else:
            entries = torch.arange(start // ratio, end // ratio)
            target = EntryTarget(pool, entries, rotation(entries * ratio, FREQUENCIES.compressed))
            compressor.prefill(x[start:end], state[1], target, start=start)
        start = end
    return load_rows(pool, torch.arange(num_entries))


@pytest.mark.parametrize(
    "chunks",
    [[20], [1] * 20, [2, 1, 3, 1, 1, 5, 7], [4, 4, 4, 4, 4], [3, 9, 1, 7], [19, 1]],
    ids=str,
)
def test_overlapping_compressor_pools_8_tokens_an_entry(chunks: list[int]) -> None:
    compressor = Compressor.from_weights(WEIGHTS, "layers.2.attn.compressor.", C4_RATIO, SPEC)
    x = torch.randn(20, SPEC.hidden_size)
    entries = compress(compressor, x, chunks, ring=8)
    for entry in range(5):
        torch.testing.assert_close(entries[entry], expected_entry(compressor, x, entry), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "chunks", [[300], [1] * 300, [100, 27, 1, 1, 127, 44]], ids=["one", "steps", "mixed"]
)
def test_wide_compressor_pools_its_own_128_tokens(chunks: list[int]) -> None:
    compressor = Compressor.from_weights(WEIGHTS, "layers.3.attn.compressor.", C128_RATIO, SPEC)
    x = torch.randn(300, SPEC.hidden_size)
    entries = compress(compressor, x, chunks, ring=128)
    for entry in range(2):
        torch.testing.assert_close(entries[entry], expected_entry(compressor, x, entry), atol=2e-5, rtol=0)


def key_pool(keys: Tensor) -> KeyPool:
    """An fp32 pool with keys [N, D] at slots 0..N-1 of blocks of 8."""
    layout = KeyLayout(8, keys.shape[1], "fp32")
    num_blocks = -(-keys.shape[0] // 8)
    pool = KeyPool(torch.zeros(num_blocks, layout.plane_bytes, dtype=torch.uint8), 0, layout)
    store_rows(pool, torch.arange(keys.shape[0]), keys)
    return pool


def test_indexer_selects_the_same_in_prefill_and_decode() -> None:
    spec = ModelSpec.from_config({**CONFIG, "index_topk": 5})
    indexer = Indexer.from_weights(WEIGHTS, "layers.2.attn.indexer.", spec)
    num_tokens, start = 40, 30
    keys = torch.randn((start + num_tokens) // 4, spec.index_dims)
    ask = IndexerQuery(torch.randn(num_tokens, spec.index_heads, spec.index_dims), torch.randn(num_tokens, 4))
    pool = key_pool(keys)
    slots = torch.arange(keys.shape[0])
    together = indexer.select_prefill(ask, pool, slots=slots, start=start)
    table = torch.arange(pool.bytes.shape[0], dtype=torch.int32).expand(num_tokens, -1).contiguous()
    visible = (torch.arange(start, start + num_tokens) + 1) // 4
    alone = indexer.select(ask, pool, block_table=table, visible=visible)
    assert torch.equal(together.selected, alone.selected)
    torch.testing.assert_close(together.scores, alone.scores, atol=1e-4, rtol=0)
    dots = torch.einsum("thd,nd->thn", ask.query, keys).relu()
    scores = torch.einsum("thn,th->tn", dots, ask.weights)
    for token in range(num_tokens):
        ranked = scores[token, : visible[token]].sort(descending=True, stable=True)  # ties: all-negative dots
        best = ranked.indices[:5].sort().values
        assert torch.equal(together.selected[token], best)


def test_prefill_indexer_takes_tied_entries_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forepage.model.indexer.PREFILL_SCORES", 40)  # several tiles of tokens
    spec = ModelSpec.from_config({**CONFIG, "index_topk": 3})
    indexer = Indexer.from_weights(WEIGHTS, "layers.2.attn.indexer.", spec)
    ask = IndexerQuery(torch.ones(24, spec.index_heads, spec.index_dims), torch.ones(24, 4))
    tap = indexer.select_prefill(
        ask, key_pool(torch.ones(6, spec.index_dims)), slots=torch.arange(6), start=0
    )
    assert tap.selected[-1].tolist() == [0, 1, 2]
    assert tap.selected[6].tolist() == [0, -1, -1]
    assert tap.selected[0].tolist() == [-1, -1, -1]
    assert tap.scores[0].isneginf().all()


def test_rotated_queries_score_rotated_keys_alike_until_rounded() -> None:
    indexer = Indexer.from_weights(WEIGHTS, "layers.2.attn.indexer.", SPEC)
    x, latent = torch.randn(3, SPEC.hidden_size), torch.randn(3, SPEC.q_lora_rank)
    turn = rotation(torch.tensor([5, 6, 7]), FREQUENCIES.compressed)
    plain = indexer.query(x, latent, turn, keys=KeyLayout(64, SPEC.index_dims, "fp32"))
    rotated = indexer.query(x, latent, turn, keys=KeyLayout(64, SPEC.index_dims, "fp8"))
    key = torch.randn(SPEC.index_dims)
    turned = hadamard(plain.query)
    torch.testing.assert_close(turned @ hadamard(key), plain.query @ key, atol=1e-4, rtol=0)
    assert torch.equal(rotated.query, turned.bfloat16().float())
    assert torch.equal(rotated.weights, plain.weights)
    scale = SPEC.index_dims**-0.5 * SPEC.index_heads**-0.5
    torch.testing.assert_close(plain.weights, x @ indexer.w_heads.T * scale)


def test_attention_puts_the_sink_in_the_denominator_only() -> None:
    q, rows, sinks = torch.randn(4, 2, 8), torch.randn(6, 8), torch.tensor([0.5, -40.0])
    mask = torch.rand(4, 6) < 0.5
    mask[:, 0] = True
    out = attend_masked(q, rows, mask, sinks, scale=0.3)
    for token in range(4):
        seen = rows[mask[token]]
        for head in range(2):
            weights = (seen @ q[token, head] * 0.3).exp()
            expected = weights @ seen / (weights.sum() + sinks[head].exp())
            torch.testing.assert_close(out[token, head], expected, atol=1e-5, rtol=0)


def test_attention_survives_a_sink_far_above_every_score() -> None:
    out = attend_masked(
        torch.randn(1, 1, 8),
        torch.randn(3, 8),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([200.0]),
        scale=1,
    )
    assert torch.equal(out, torch.zeros_like(out))


def test_masks_see_the_window_and_closed_entries() -> None:
    window = window_mask(130, 132, 2, 128, device=CPU)
    assert window.shape == (2, 130)
    assert window[0].nonzero().flatten().tolist() == list(range(1, 129))  # tokens 3..130
    assert window[1].nonzero().flatten().tolist() == list(range(2, 130))
    closed = closed_mask(6, 9, 4, device=CPU)  # tokens 6, 7, 8 of which 7 closes entry 1
    assert closed.tolist() == [[True, False], [True, True], [True, True]]
    chosen = selection_mask(torch.tensor([[0, 2, -1], [-1, -1, -1]]), 4)
    assert chosen.tolist() == [[True, False, True, False], [False] * 4]
