"""What the model computes from its quantised cache equals what the reference simulates without one.

The reference has no such cache: it rounds rows to FP8 and index keys and queries to FP4 on their way, and
keeps them wide. `rigs.plain_model` does that in fp64 without any cache, with the roundings written here.
Its values are compared with the pools' bytes, decoded: equal, or, where a value lies within fp32 noise of
a tie between two codes, the neighbour. Such a neighbour is taken over, so the rest stays comparable.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from forepage.kv.geometry import BLOCK_ENTRIES, KeyFormat, KvFormat, KvGeometry
from forepage.model.kv_pools import DecodeBatch, KvPools, PoolCapacity, PoolLayers, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import StepOutput, Transformer
from forepage.model.weights import seeded_weights
from forepage_kernels.layout import load_rows
from rigs.parity import ATOL, Subject
from rigs.parity_configs import FLASH
from rigs.plain_model import PlainModel

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = FLASH | {"head_dim": 192}
"""128 nope dims: two FP8 groups a row."""
NUM_TOKENS, PREFILLED, CHUNK = 300, 270, 90
NOISE = 1e-5
"""Of a row's largest value: what fp32 and fp64 may differ by; five times what was seen."""
MAX_FLIPS = 1e-3
"""Share of codes that such noise may turn."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def fp8(x: Tensor, amax: Tensor) -> Tensor:
    """x f64 [..., group] -> e4m3 under 2^ceil(log2(max(amax, 1e-4) / 448)), decoded."""
    scale = 2.0 ** torch.ceil(torch.log2(amax.clamp(min=1e-4) / 448))
    return (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale


def fp4(x: Tensor, amax: Tensor) -> Tensor:
    """x f64 [..., group] -> e2m1 under 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), decoded; ties to even."""
    scale = 2.0 ** torch.ceil(torch.log2(amax.clamp(min=6 * 2.0**-126) / 6))
    distance = ((x / scale).abs().unsqueeze(-1) - E2M1).abs() + torch.arange(8) % 2 * 1e-12
    return E2M1[distance.argmin(-1)] * torch.sign(x) * scale


def bf16(x: Tensor, amax: Tensor) -> Tensor:
    """x f64 -> bf16, decoded."""
    del amax
    return x.float().bfloat16().double()


def plain_hadamard(x: Tensor) -> Tensor:
    """The orthonormal Sylvester matrix times x [..., d]."""
    dims = x.shape[-1]
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(dims)] for i in range(dims)]
    return x @ torch.tensor(signs, dtype=torch.float64) / math.sqrt(dims)


@dataclass
class Stored:
    """What the pools held, decoded f32: rows and keys by layer, in the text's order; and the queries."""

    window: dict[int, Tensor]
    compressed: dict[int, Tensor]
    keys: dict[int, Tensor]
    queries: dict[int, Tensor]


@dataclass
class Compared:
    """The reference's roundings, each result compared with what our cache held."""

    stored: Stored
    key_format: KeyFormat
    codes: int = 0
    flips: dict[str, int] = field(default_factory=dict)

    def window_rows(self, layer: int, x: Tensor) -> Tensor:
        """FP8 in groups of 64 but for the rope dims."""
        return self._rows(x, self.stored.window[layer], "window row")

    def compressed_rows(self, layer: int, x: Tensor) -> Tensor:
        """The same."""
        return self._rows(x, self.stored.compressed[layer], "compressed row")

    def index_keys(self, layer: int, x: Tensor) -> Tensor:
        """Rotated, then FP4 in groups of 32; or FP8 under one scale a key."""
        turned, stored = plain_hadamard(x), self.stored.keys[layer]
        if self.key_format is KeyFormat.MXFP4:
            return self._settle(turned, stored, fp4, 32, "mxfp4 key")
        return self._settle(turned, stored, fp8, x.shape[-1], "fp8 key")

    def index_queries(self, layer: int, x: Tensor) -> Tensor:
        """Rotated, and FP4 beside FP4 keys, bf16 beside FP8 ones."""
        turned, stored = plain_hadamard(x), self.stored.queries[layer]
        if self.key_format is KeyFormat.MXFP4:
            return self._settle(turned, stored, fp4, 32, "mxfp4 query")
        return self._settle(turned, stored, bf16, x.shape[-1], "bf16 query")

    def _rows(self, x: Tensor, stored: Tensor, name: str) -> Tensor:
        nope = x.shape[1] - CONFIG["qk_rope_head_dim"]
        plain = self._settle(x[:, :nope], stored[:, :nope], fp8, 64, name)
        rope = self._settle(x[:, nope:], stored[:, nope:], bf16, x.shape[1] - nope, name)
        return torch.cat((plain, rope), dim=1)

    def _settle(
        self, x: Tensor, stored: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], group: int, name: str
    ) -> Tensor:
        """x and stored [..., d]; stored must be x rounded, or a neighbour that noise could have made it."""
        assert x.shape == stored.shape
        groups, held = x.unflatten(-1, (-1, group)), stored.double().unflatten(-1, (-1, group))
        amax = groups.abs().amax(-1, keepdim=True)
        same = rounded(groups, amax) == held
        allowed = same.clone()
        noise = NOISE * amax
        for limit in (amax - noise, amax + noise):  # the scale itself may be near a step
            near = rounded(groups, limit)
            allowed |= (near == held) | ((groups - (near + held) / 2).abs() <= noise)
        assert bool(allowed.all()), f"{name}: {int((~allowed).sum())} of {allowed.numel()} codes differ"
        self.codes += same.numel()
        self.flips[name] = self.flips.get(name, 0) + int((~same).sum())
        return stored.double()


def run_cached(transformer: Transformer, tokens: Tensor) -> tuple[Tensor, Stored, list[StepOutput]]:
    """Prefill in chunks, decode the rest; logits of every token, and everything that was stored."""
    geometry = transformer.geometry
    blocks = geometry.num_blocks(len(tokens))
    pools = KvPools.poisoned(geometry, PoolCapacity(1, blocks, blocks, blocks), CPU)
    layers, table = PoolLayers(geometry, pools), torch.arange(blocks, dtype=torch.int32)
    starts = [*range(0, PREFILLED, CHUNK), *range(PREFILLED, len(tokens))]
    window: dict[int, list[Tensor]] = {layer: [] for layer in range(geometry.num_layers)}
    outputs = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if start < PREFILLED:
            place = PrefillChunk(0, start, table, table, table)
            output = transformer.prefill(tokens[start:end], place, pools, all_logits=True)
        else:
            tables, absent = table.unsqueeze(0), torch.full((1, blocks), -1)
            batch = DecodeBatch(
                slots=torch.tensor([0]),
                positions=torch.tensor([start]),
                row_table=tables,
                key_table=tables,
                c128_table=tables,
                staging=torch.full((1, transformer.spec.index_topk // BLOCK_ENTRIES), -1),
                arena_offsets=absent,
            )
            output = transformer.decode(tokens[start:end], batch, pools, None)
        outputs.append(output)
        ring = torch.arange(start, end) % geometry.window_tokens
        for layer, rows in window.items():
            rows.append(load_rows(layers.window(layer), ring))
    c4, c128 = enumerate(geometry.c4_layers), enumerate(geometry.c128_layers)
    entries, wide = torch.arange(len(tokens) // 4), torch.arange(len(tokens) // 128)
    compressed = {layer: load_rows(layers.c128(i), wide) for i, layer in c128}
    keys, queries = {}, {}
    for i, layer in c4:
        compressed[layer] = load_rows(layers.rows(i), entries)
        keys[layer] = load_rows(layers.keys(i), entries)
        queries[layer] = torch.cat([output.indexer[i].query for output in outputs])
    stored = Stored({layer: torch.cat(rows) for layer, rows in window.items()}, compressed, keys, queries)
    return torch.cat([output.logits for output in outputs]), stored, outputs


@pytest.mark.parametrize("key_format", [KeyFormat.FP8, KeyFormat.MXFP4])
def test_cache_holds_what_the_reference_simulates(key_format: KeyFormat) -> None:
    spec = ModelSpec.from_config(CONFIG)
    weights = seeded_weights(spec, 1, dtype=torch.float32, device=CPU)
    geometry = KvGeometry.from_config(CONFIG, KvFormat.FP8, key_format)
    transformer = Transformer(spec, geometry, weights, CPU)
    tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    logits, stored, outputs = run_cached(transformer, tokens)
    compared = Compared(stored, key_format)
    plain = PlainModel(CONFIG, weights, compared)
    expected = plain.run(tokens)
    assert sum(compared.flips.values()) <= MAX_FLIPS * compared.codes
    torch.testing.assert_close(logits.double(), expected, atol=ATOL, rtol=0)
    for layer, want in enumerate(plain.scores):
        taps = [output.indexer[layer] for output in outputs]
        selected = torch.cat([tap.selected for tap in taps])
        scores = torch.cat([tap.scores for tap in taps]).double()
        visible = (torch.arange(NUM_TOKENS) + 1) // 4
        assert torch.equal((selected >= 0).sum(1), visible)
        picked = want.gather(1, selected.clamp(min=0))[selected >= 0]
        torch.testing.assert_close(scores[selected >= 0], picked, atol=5e-6, rtol=0)


def test_plain_model_equals_transformers_when_nothing_is_rounded() -> None:
    subject = Subject.build(CONFIG, NUM_TOKENS)
    weights = seeded_weights(ModelSpec.from_config(CONFIG), 9, dtype=torch.float32, device=CPU)
    logits = PlainModel(CONFIG, weights).run(subject.tokens)
    torch.testing.assert_close(logits.float(), subject.expected, atol=ATOL, rtol=0)


def test_rounding_changes_the_logits_as_much_as_the_reference_does() -> None:
    """Guards the test above: the roundings are not nothing. Random weights, so only the size is known."""
    spec = ModelSpec.from_config(CONFIG)
    weights = seeded_weights(spec, 1, dtype=torch.float32, device=CPU)
    tokens = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    logits = []
    for kv_format in KvFormat:
        geometry = KvGeometry.from_config(CONFIG, kv_format, KeyFormat.MXFP4)
        logits.append(run_cached(Transformer(spec, geometry, weights, CPU), tokens)[0])
    assert 0.003 < (logits[0] - logits[1]).abs().median() < 0.3
