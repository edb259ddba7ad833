"""Memory of the throughput runs in which others come: as the worker would divide and promise it."""

from itertools import product

import pytest

from forepage.kv.geometry import V4_FLASH
from forepage.settings import WorkerSettings
from forepage.worker.gpu_blocks import PoolSizes
from loadtest.throughput.case import Arm, Case, Plan
from loadtest.throughput.moves import Crowd
from loadtest.throughput.prefill import Guest

PLAN = Plan(
    kv_bytes=16 << 30,
    answer_tokens=8192,
    recent_tokens=2048,
    slack_blocks=64,
    overlap=0.85,
    interval_steps=64,
    topk=512,
)
FOOTPRINTS = {65_536: 0.25, 262_144: 0.105}
CASES = [Case(arm, size, FOOTPRINTS[size], PLAN, V4_FLASH) for arm, size in product(Arm, FOOTPRINTS)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arm}-{case.context_tokens}")
PREFIX = "FOREPAGE_WORKER__"


def pools(changes: dict[str, str], *, kv_bytes: int) -> PoolSizes:
    """As the worker divides its memory with these settings."""
    given = {
        key.removeprefix(PREFIX).lower(): value for key, value in changes.items() if key.startswith(PREFIX)
    }
    settings = WorkerSettings.model_validate({"kv_bytes": kv_bytes, "escalation_reserve_bytes": 0} | given)
    return PoolSizes.from_settings(settings, V4_FLASH, topk=PLAN.topk)


@each_case
def test_a_long_prompt_has_its_place_beside_the_others(case: Case) -> None:
    guest = Guest(131_072, case)
    count = guest.others(16)
    assert 1 <= count <= 16
    sizes = pools(guest.changes(count, chunk_tokens=512, share=0.45), kv_bytes=PLAN.kv_bytes)
    staging = sizes.staging_blocks if case.keeps_keys else 0
    prompt = V4_FLASH.num_blocks(case.prompt_tokens)
    admitted = (max(prompt + staging, case.rows), max(prompt, case.keys))
    for available, steady, newest in zip(
        (sizes.row_blocks, sizes.key_blocks), (case.rows, case.keys), admitted, strict=True
    ):
        assert available >= (count - 1) * steady + newest, "the last of the others is admitted"
        assert available >= count * steady + guest.num_blocks, "and the guest beside them"
    assert sizes.c128_blocks >= count * case.total_blocks + guest.num_blocks
    assert sizes.slots == count + 1
    assert guest.num_blocks == 513


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.arm not in (Arm.FULL, Arm.DEMAND)], ids=lambda case: case.arm
)
def test_guests_find_room_once_the_others_are_paged_and_not_before(case: Case) -> None:
    crowd = Crowd(case, staying=6, guest_tokens=64)
    assert crowd.guests >= 1
    sizes = pools(crowd.changes(), kv_bytes=crowd.kv_bytes)
    whole, wanted = 6 * case.total_blocks, crowd.guests * crowd.guest_blocks
    assert whole <= sizes.row_blocks < whole + crowd.guest_blocks
    assert sizes.key_blocks >= whole
    assert sizes.row_blocks >= 6 * case.rows + wanted
    assert sizes.key_blocks >= 6 * case.keys + wanted
    assert sizes.c128_blocks >= whole + crowd.guests * crowd.guest_blocks
    assert sizes.slots == 6 + crowd.guests
    assert sizes.row_blocks < 6 * case.rows + wanted + crowd.guest_blocks, "no guest more would"
