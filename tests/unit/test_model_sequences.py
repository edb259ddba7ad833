"""Sequences on the pools: paged equals resident, absent memory is never read, resume equals going on.

The seeded model with fp8 rows and either format of keys. Every pool starts as NaN, so one read of a place
that nothing was stored in makes the logits NaN.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import forepage.model
from forepage.errors import IntegrityError, ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.kv_pools import NAN_BYTE, DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.resume import restore, snapshot
from forepage.model.spec import ModelSpec, read_config
from forepage.model.transformer import StepOutput, Transformer
from forepage.model.weights import seeded_weights

CPU = torch.device("cpu")
FOLDER = Path(forepage.model.__file__).parent / "bundled" / "seeded"
CONFIG = read_config(FOLDER)
SPEC = ModelSpec.from_config(CONFIG)
GEOMETRY = KvGeometry.from_config(CONFIG, KvFormat.FP8)
PROMPTS = (1537, 700, 300, 5)
"""Tokens prefilled of each sequence of a batch."""
NUM_STEPS = 10
NUM_BLOCKS = GEOMETRY.num_blocks(max(PROMPTS) + NUM_STEPS)
STAGING_BLOCKS = -(-SPEC.index_topk // GEOMETRY.block_entries)


@dataclass(frozen=True)
class World:
    """Pools of some sequences with room for staging, and the tables that address them."""

    pools: KvPools
    batch: DecodeBatch
    arena: Tensor


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[KeyFormat.FP8, KeyFormat.MXFP4])
def transformer(request: pytest.FixtureRequest) -> Transformer:
    weights = seeded_weights(SPEC, 0, dtype=torch.float32, device=CPU)
    geometry = KvGeometry.from_config(CONFIG, KvFormat.FP8, request.param)
    return Transformer(SPEC, geometry, weights, CPU, target_layers=SPEC.c4_layers)


@pytest.fixture
def world(transformer: Transformer) -> World:
    """PROMPTS prefilled, everything resident; the arena holds a copy of every block."""
    count = len(PROMPTS)
    blocks = count * NUM_BLOCKS
    capacity = PoolCapacity(
        count, row_blocks=blocks + count * STAGING_BLOCKS, key_blocks=blocks, c128_blocks=blocks
    )
    pools = KvPools.poisoned(transformer.geometry, capacity, CPU)
    # Interleaved ids: sequence b has blocks b, b + count, ...; a wrong table row reads another's block.
    table = torch.arange(blocks, dtype=torch.int32).view(NUM_BLOCKS, count).T.contiguous()
    for sequence, num_tokens in enumerate(PROMPTS):
        row = table[sequence]
        for start in range(0, num_tokens, 256):
            chunk = PrefillChunk(sequence, start, row, row, row)
            transformer.prefill(text(sequence)[start : min(start + 256, num_tokens)], chunk, pools)
    arena = torch.full((blocks * transformer.geometry.slot_bytes,), NAN_BYTE, dtype=torch.uint8)
    records = arena.view(blocks, transformer.geometry.slot_bytes)
    records[:, : transformer.geometry.rows_bytes] = pools.rows[:blocks]
    batch = DecodeBatch(
        slots=torch.arange(count),
        positions=torch.tensor(PROMPTS),
        row_table=table,
        key_table=table,
        c128_table=table,
        staging=torch.arange(blocks, blocks + count * STAGING_BLOCKS).view(count, STAGING_BLOCKS),
        arena_offsets=table.long() * transformer.geometry.slot_bytes,
    )
    return World(pools, batch, arena)


def text(sequence: int) -> Tensor:
    """A fixed random text for each sequence, longer than anything run here."""
    generator = torch.Generator().manual_seed(sequence)
    return torch.randint(256, (max(PROMPTS) + NUM_STEPS,), generator=generator)


def decode(transformer: Transformer, world: World, arena: Tensor | None) -> list[StepOutput]:
    """NUM_STEPS steps of the texts from the world's positions on."""
    outputs = []
    for step in range(NUM_STEPS):
        positions = world.batch.positions + step
        tokens = torch.stack([text(s)[p] for s, p in enumerate(positions.tolist())])
        batch = replace(world.batch, positions=positions)
        outputs.append(transformer.decode(tokens, batch, world.pools, arena))
    return outputs


def without_rows(world: World, dropped: list[tuple[int, int]]) -> World:
    """The same world after evicting (sequence, block_idx) row blocks: their bytes are NaN."""
    rows, row_table = world.pools.rows.clone(), world.batch.row_table.clone()
    for sequence, block in dropped:
        rows[row_table[sequence, block]] = NAN_BYTE
        row_table[sequence, block] = -1
    pools = replace(
        world.pools,
        rows=rows,
        keys=world.pools.keys.clone(),
        c128=world.pools.c128.clone(),
        window=world.pools.window.clone(),
        c4_state=world.pools.c4_state.clone(),
        key_state=world.pools.key_state.clone(),
        c128_state=world.pools.c128_state.clone(),
    )
    return World(pools, replace(world.batch, row_table=row_table), world.arena)


def test_pulled_rows_give_the_same_bits_as_resident_ones(transformer: Transformer, world: World) -> None:
    # Every block but each sequence's open one, whose tokens are not in the arena's copy yet.
    dropped = [(s, b) for s, tokens in enumerate(PROMPTS) for b in range(tokens // 256)]
    paged = without_rows(world, dropped)
    resident = decode(transformer, world, world.arena)
    pulled = decode(transformer, paged, paged.arena)
    for theirs, ours in zip(resident, pulled, strict=True):
        assert torch.equal(theirs.logits, ours.logits)
        assert torch.equal(theirs.hidden, ours.hidden)
        for tap, paged_tap in zip(theirs.indexer, ours.indexer, strict=True):
            assert torch.equal(tap.selected, paged_tap.selected)
            assert torch.equal(tap.scores, paged_tap.scores)
        assert not theirs.pulled_rows.any()
        assert (ours.pulled_rows[:3] > 0).all()
        assert ours.pulled_rows[3] == 0
        assert not ours.unserved_rows.any()


def test_some_pulled_and_some_resident_rows_give_the_same_bits(
    transformer: Transformer, world: World
) -> None:
    paged = without_rows(world, [(0, 0), (0, 3), (1, 1)])
    resident = decode(transformer, world, None)
    pulled = decode(transformer, paged, paged.arena)
    for theirs, ours in zip(resident, pulled, strict=True):
        assert torch.equal(theirs.logits, ours.logits)
    assert sum(int(output.pulled_rows.sum()) for output in pulled) > 0


def test_absent_keys_are_neither_read_nor_selected(transformer: Transformer, world: World) -> None:
    dropped = [(0, 1), (0, 2), (1, 0)]
    paged = without_rows(world, dropped)
    key_table = paged.batch.key_table.clone()
    for sequence, block in dropped:
        paged.pools.keys[key_table[sequence, block]] = NAN_BYTE
        key_table[sequence, block] = -1
    batch = replace(paged.batch, key_table=key_table, staging=torch.full_like(paged.batch.staging, -1))
    for output in decode(transformer, replace(paged, batch=batch), None):
        assert output.logits.isfinite().all()
        assert not output.unserved_rows.any()
        for tap in output.indexer:
            blocks = tap.selected // GEOMETRY.block_entries
            for sequence, block in dropped:
                assert not ((blocks[sequence] == block) & (tap.selected[sequence] >= 0)).any()
            assert tap.scores[tap.selected >= 0].isfinite().all()
            assert tap.scores[tap.selected < 0].isneginf().all()


def test_selected_rows_that_cannot_be_pulled_are_counted(transformer: Transformer, world: World) -> None:
    paged = without_rows(world, [(0, 0)])
    with_arena = replace(
        paged, batch=replace(paged.batch, arena_offsets=torch.full_like(paged.batch.arena_offsets, -1))
    )
    for output in (decode(transformer, paged, None)[0], decode(transformer, with_arena, paged.arena)[0]):
        assert output.unserved_rows[0] > 0
        assert output.pulled_rows[0] == 0
        assert not output.unserved_rows[1:].any()
        assert output.logits.isfinite().all()


def test_padding_rows_leave_other_sequences_alone(transformer: Transformer, world: World) -> None:
    """A batch filled up with a row of a spare slot gives the real row's logits and writes only that slot."""
    keep, spare = torch.tensor([1]), 3
    alone = replace(
        world,
        batch=DecodeBatch(**{name: tensor[keep] for name, tensor in vars(world.batch).items()}),
    )
    padded_batch = DecodeBatch(
        **{
            name: torch.cat((tensor[keep], torch.full_like(tensor[:1], -1)))
            for name, tensor in vars(world.batch).items()
        }
    )
    padded_batch.slots[1], padded_batch.positions[1] = spare, 0
    padded = without_rows(replace(world, batch=padded_batch), [])
    tokens = text(1)[PROMPTS[1]].expand(2)
    ours = transformer.decode(tokens, padded.batch, padded.pools, padded.arena)
    theirs = transformer.decode(tokens[:1], alone.batch, alone.pools, alone.arena)
    torch.testing.assert_close(ours.logits[:1], theirs.logits, atol=1e-5, rtol=0)
    for pool in ("rows", "keys", "c128"):
        assert torch.equal(getattr(padded.pools, pool), getattr(alone.pools, pool)), pool


def test_outputs_carry_hidden_states_of_the_target_layers(transformer: Transformer, world: World) -> None:
    output = decode(transformer, world, None)[0]
    shape = (len(PROMPTS), len(SPEC.c4_layers), SPEC.hidden_size)
    assert output.hidden.shape == shape
    assert output.logits.shape == (len(PROMPTS), SPEC.vocab_size)
    assert [tap.query.shape for tap in output.indexer] == [
        (len(PROMPTS), SPEC.index_heads, SPEC.index_dims) for _ in SPEC.c4_layers
    ]


def test_decode_continues_what_prefill_would_have_said(transformer: Transformer, world: World) -> None:
    """Both attend the same stored bytes; what differs is rounding, and fp8 steps that it tips over."""
    outputs = decode(transformer, world, None)
    for sequence, num_tokens in enumerate(PROMPTS):
        table = world.batch.row_table[sequence]
        whole = text(sequence)[: num_tokens + NUM_STEPS]
        fresh = KvPools.poisoned(
            transformer.geometry, PoolCapacity(1, len(table) * 4, len(table) * 4, len(table) * 4), CPU
        )
        place = PrefillChunk(0, 0, table, table, table)
        expected = transformer.prefill(whole, place, fresh, all_logits=True).logits[num_tokens:]
        logits = torch.stack([output.logits[sequence] for output in outputs])
        torch.testing.assert_close(logits, expected, atol=5e-2, rtol=0)
        assert (logits - expected).abs().median() < 1e-4


def test_bf16_model_stays_close_to_fp32(transformer: Transformer) -> None:
    weights = seeded_weights(SPEC, 0, dtype=torch.bfloat16, device=CPU)
    narrow = Transformer(SPEC, transformer.geometry, weights, CPU)
    logits = []
    for model in (transformer, narrow):
        pools = KvPools.poisoned(transformer.geometry, PoolCapacity(1, 2, 2, 2), CPU)
        table = torch.arange(2, dtype=torch.int32)
        place = PrefillChunk(0, 0, table, table, table)
        model.prefill(text(0)[:300], place, pools)
        tables = table.unsqueeze(0)
        batch = DecodeBatch(
            slots=torch.tensor([0]),
            positions=torch.tensor([300]),
            row_table=tables,
            key_table=tables,
            c128_table=tables,
            staging=torch.full((1, STAGING_BLOCKS), -1),
            arena_offsets=torch.full(tables.shape, -1),
        )
        logits.append(model.decode(text(0)[300:301], batch, pools, None).logits)
    assert (logits[0] - logits[1]).abs().median() < 0.2


@pytest.mark.parametrize("num_tokens", [256, 768])
def test_resumed_sequence_continues_bit_for_bit(transformer: Transformer, num_tokens: int) -> None:
    rest = (100, 40)  # more prefill, then decode steps
    num_blocks = transformer.geometry.num_blocks(num_tokens + sum(rest))
    capacity = PoolCapacity(2, row_blocks=num_blocks, key_blocks=num_blocks, c128_blocks=num_blocks)
    table = torch.arange(num_blocks, dtype=torch.int32)
    first = KvPools.poisoned(transformer.geometry, capacity, CPU)
    for start in range(0, num_tokens, 128):
        place = PrefillChunk(0, start, table, table, table)
        transformer.prefill(text(0)[start : start + 128], place, first)
    payload = snapshot(first, 0, num_tokens, transformer.geometry)
    assert payload.shape == (transformer.geometry.resume_bytes,)

    second = KvPools.poisoned(transformer.geometry, capacity, CPU)
    moved = table.flip(0).contiguous()
    for pool in ("rows", "keys", "c128"):
        getattr(second, pool)[moved.long()] = getattr(first, pool)
    restore(second, 1, num_tokens, transformer.geometry, payload)
    theirs = go_on(transformer, first, slot=0, table=table, start=num_tokens, rest=rest)
    ours = go_on(transformer, second, slot=1, table=moved, start=num_tokens, rest=rest)
    assert torch.equal(theirs, ours)


def go_on(
    transformer: Transformer, pools: KvPools, *, slot: int, table: Tensor, start: int, rest: tuple[int, int]
) -> Tensor:
    """Logits of a prefill chunk from `start` on and of the decode steps after it."""
    num_prefill, num_steps = rest
    place = PrefillChunk(slot, start, table, table, table)
    tokens = text(0)
    output = transformer.prefill(tokens[start : start + num_prefill], place, pools, all_logits=True)
    logits = [output.logits]
    tables = table.unsqueeze(0)
    for position in range(start + num_prefill, start + num_prefill + num_steps):
        batch = DecodeBatch(
            slots=torch.tensor([slot]),
            positions=torch.tensor([position]),
            row_table=tables,
            key_table=tables,
            c128_table=tables,
            staging=torch.full((1, STAGING_BLOCKS), -1),
            arena_offsets=torch.full(tables.shape, -1),
        )
        logits.append(transformer.decode(tokens[position : position + 1], batch, pools, None).logits)
    return torch.cat(logits)


def test_resume_is_refused_off_a_block_boundary(transformer: Transformer, world: World) -> None:
    del transformer
    for num_tokens in (0, 128, 300):
        with pytest.raises(IntegrityError, match=str(num_tokens)):
            snapshot(world.pools, 0, num_tokens, GEOMETRY)
    short = torch.zeros(GEOMETRY.resume_bytes - 1, dtype=torch.uint8)
    with pytest.raises(IntegrityError, match="expected u8"):
        restore(world.pools, 0, 256, GEOMETRY, short)


def test_prefill_over_an_absent_block_is_refused(transformer: Transformer, world: World) -> None:
    table = world.batch.row_table[0]
    hole, short = table.clone(), table[:4].contiguous()
    hole[2] = -1
    for bad in (hole, short):
        place = PrefillChunk(0, 1537, bad, table, table)
        with pytest.raises(IntegrityError, match="block"):
            transformer.prefill(text(0)[1537:1545], place, world.pools)


def test_unknown_target_layer_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="target layer 7"):
        Transformer(SPEC, GEOMETRY, {}, CPU, target_layers=(2, 7))


def test_another_models_geometry_is_refused() -> None:
    other = KvGeometry.from_config({**CONFIG, "sliding_window": 64}, KvFormat.FP8)
    with pytest.raises(ModelFormatError, match="geometry"):
        Transformer(SPEC, other, {}, CPU)
