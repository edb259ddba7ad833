"""The index over an arena that is missing, stale, damaged or replaced: never wrong keys, always a reply."""

from pathlib import Path

import pytest

from forepage.coldpool.records import payload_checksum
from rigs.index_stream import asking, question, serving_index
from rigs.key_arena import KeyArena


async def test_questions_before_the_arena_exists_are_refused_then_answered(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    async with serving_index(path) as index, asking(index.address) as asker:
        reply = await asker.ask(question(1, []))
        assert reply.error_code == "dependency_unavailable"
        assert "cold pool" in reply.error_message
        made = KeyArena.create(path, num_slots=3)
        refs = [made.complete(slot) for slot in range(3)]
        reply = await asker.ask(question(2, refs))
        assert (reply.error_code, reply.plan.num_scored) == ("", 3)


async def test_stale_generations_are_unread(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=4)
    refs = [made.complete(slot) for slot in range(4)]
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        before = await asker.ask(question(1, refs, audited=True))
        made.complete(0, generation=2)  # evicted and given to another record
        made.rewrite(3, generation=2)
        after = await asker.ask(question(2, refs, audited=True))
    assert (before.plan.num_scored, before.audits[0].num_unread) == (4, 0)
    assert (after.plan.num_scored, after.audits[0].num_unread) == (2, 2)
    assert set(after.plan.block_idx) <= {1, 2}
    assert set(after.audits[0].missing_block_idx) <= {1, 2}


async def test_damaged_payload_is_unread(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=3)
    refs = [made.complete(slot) for slot in range(3)]
    for layer in range(3):
        made.damage(1, layer)
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        reply = await asker.ask(question(1, refs, audited=True))
    assert reply.error_code == ""
    assert 1 not in reply.plan.block_idx
    assert reply.audits[0].num_unread == 1
    assert 1 not in reply.audits[0].missing_block_idx


async def test_replaced_arena_is_mapped_and_old_refs_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    old = KeyArena.create(path, num_slots=3, seed=1)
    old_refs = [old.complete(slot, generation=5) for slot in range(3)]
    async with serving_index(path) as index, asking(index.address) as asker:
        first = await asker.ask(question(1, old_refs))
        new = KeyArena.create(path, num_slots=6, seed=2)
        new_refs = [new.complete(slot, generation=9) for slot in range(3)]
        stale = await asker.ask(question(2, old_refs))
        fresh = await asker.ask(question(3, new_refs))
    assert (first.plan.num_scored, stale.plan.num_scored, fresh.plan.num_scored) == (3, 0, 3)
    assert list(stale.plan.block_idx) == []
    assert list(first.plan.score) != list(fresh.plan.score)  # the same question, other keys


async def test_arena_that_is_gone_is_served_from_the_old_mapping(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=3)
    refs = [made.complete(slot) for slot in range(3)]
    async with serving_index(made.arena.path) as index, asking(index.address) as asker:
        await asker.ask(question(1, refs))
        made.arena.unlink()
        reply = await asker.ask(question(2, refs))
    assert (reply.error_code, reply.plan.num_scored) == ("", 3)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("short", "the superblock wants"),
        ("garbage", "no superblock"),
        ("changed", "damaged"),
        ("version", "layout version 99"),
    ],
)
async def test_file_that_is_no_arena_is_refused_until_it_is_one(
    tmp_path: Path, damage: str, says: str
) -> None:
    path = tmp_path / "arena"
    made = KeyArena.create(tmp_path / "whole", num_slots=3).arena
    whole, described = made.path.read_bytes(), len(made.shape.encode())
    other = whole[:8] + b"\x63" + whole[9 : described - 8]
    path.write_bytes(
        {
            "short": whole[:-1],
            "garbage": bytes(len(whole)),
            "changed": other + whole[len(other) :],
            "version": other + payload_checksum(other).to_bytes(8, "little") + whole[described:],
        }[damage]
    )
    async with serving_index(path) as index, asking(index.address) as asker:
        reply = await asker.ask(question(1, []))
        assert reply.error_code == "integrity_error"
        assert says in reply.error_message
        right = KeyArena.create(path, num_slots=3)
        reply = await asker.ask(question(2, [right.complete(0)]))
        assert (reply.error_code, reply.plan.num_scored) == ("", 1)
