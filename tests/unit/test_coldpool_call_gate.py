"""The gate between calls that go together and the one that must be alone."""

import asyncio

from forepage.coldpool.call_gate import CallGate


async def test_gate_lets_calls_together_and_one_alone() -> None:
    gate = CallGate()
    seen: list[str] = []
    first_may_end = asyncio.Event()

    async def call(name: str) -> None:
        async with gate.call():
            seen.append(name)
            await first_may_end.wait()

    async def alone() -> None:
        async with gate.alone():
            seen.append("alone")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call("one"))
        tasks.create_task(call("two"))
        await asyncio.sleep(0)
        waiting = tasks.create_task(alone())
        await asyncio.sleep(0)
        tasks.create_task(call("late"))
        gives_up = tasks.create_task(call("never"))
        await asyncio.sleep(0)
        gives_up.cancel()
        assert seen == ["one", "two"]
        first_may_end.set()
        await waiting
    assert seen == ["one", "two", "alone", "late"]
