"""Admission: the bound holds, slots come back, draining admits nothing and ends when nothing runs."""

import asyncio

import pytest

from forepage.errors import DependencyError, RateLimitError
from forepage.gateway.admission import Admission


async def test_bound_holds_and_slots_come_back() -> None:
    admission = Admission(2)
    with admission.slot(), admission.slot(), pytest.raises(RateLimitError) as caught, admission.slot():
        pytest.fail("a third slot of two")
    assert caught.value.retry_after_s is not None
    assert admission.running == 0
    with admission.slot():
        assert admission.running == 1


async def test_slot_comes_back_after_an_error() -> None:
    admission = Admission(1)
    with pytest.raises(ValueError, match="x"), admission.slot():
        raise ValueError("x")
    assert admission.running == 0


async def test_drain_refuses_and_waits_for_the_last() -> None:
    admission = Admission(2)
    with admission.slot():
        admission.close()
        with pytest.raises(DependencyError), admission.slot():
            pytest.fail("admitted while draining")
        assert not await admission.wait_idle(0.01)
        waiting = asyncio.create_task(admission.wait_idle(5.0))
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting
