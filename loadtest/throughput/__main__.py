"""`python -m loadtest.throughput --out loadtest/results`: sequences that fit and tokens a second, by arm.

Arms that hold as much share a cold pool, an index and a worker, and a GPU memory divided for them; the
history is written straight into the cold pool. A case that fails leaves a row that says why, and the next one
goes on.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq

import grpc

from forepage.errors import ForepageError
from loadtest.throughput.case import Arm, Case
from loadtest.throughput.measure import Window, WindowError, measure
from loadtest.throughput.progress import say
from loadtest.throughput.rows import Row, row_of
from loadtest.throughput.run import Run, host_bytes, open_run, shared_options
from loadtest.throughput.system import StartError, running_system


def main(arguments: Seq[str] | None = None) -> int:
    """Measure and write; 1 when a case failed."""
    with open_run(_parser(), arguments) as run:
        asyncio.run(_measure_all(run))
        return run.exit_code


async def _measure_all(run: Run) -> None:
    """Add the rows to the result, and write it again with each."""
    for cases in _systems(run):
        async for row in _rows(run, cases):
            run.add(row)
            say(row["context_tokens"], row["arm"], row["concurrency"], row["tokens_per_s"], "tokens/s")


def _parser() -> argparse.ArgumentParser:
    contexts = [65_536, 262_144, 524_288, 1_048_576]
    parser = shared_options("loadtest.throughput", __doc__, contexts=contexts, arms=list(Arm))
    parser.add_argument("--max-sequences", type=int, default=256)
    return parser


def _systems(run: Run) -> Iterator[list[Case]]:
    """By context, the arms that hold as much: they share a system and alternate on it."""
    for context in run.options.contexts:
        alike: dict[tuple[int, int, bool], list[Case]] = {}
        for arm in run.options.arms:
            case = run.case(arm, context)
            alike.setdefault((case.rows, case.keys, case.keeps_keys), []).append(case)
        yield from alike.values()


async def _rows(run: Run, cases: Seq[Case]) -> AsyncIterator[Row]:
    """Cases whose GPU memory is divided alike, with one system: each at batch 1, then with all that fit."""
    most = min(cases[0].concurrency(), run.options.max_sequences)

    def row(
        case: Case, sequences: int, found: Window | str, *, batch1: bool, as_shipped: bool = False
    ) -> Row:
        return row_of(
            case,
            found,
            sequences=sequences,
            batch1=batch1,
            as_shipped=as_shipped,
            index_placement=run.index_placement,
            experts_stored=run.folder.spec.num_experts,
            host_bytes=host_bytes(),
        )

    wanted = [
        (case, sequences, batch1, as_shipped)
        for sequences, batch1, as_shipped in ((1, True, False), (1, True, True), (most, False, False))
        for case in cases
        if not as_shipped or case.arm is Arm.GUARDED
    ]
    if most == 0:
        for case in cases:
            failure = f"no sequence fits in {case.plan.kv_bytes} bytes"
            yield row(case, 0, failure, batch1=False)
        return
    try:
        async with running_system(
            run.model, run.folder, cases[0], sequences=most, device=run.options.device
        ) as system:
            while wanted:
                case, sequences, batch1, as_shipped = wanted.pop(0)
                try:
                    found: Seq[Window | str] = await measure(
                        system, case, sequences=sequences, length=run.length, as_shipped=as_shipped
                    )
                except (ForepageError, WindowError, OSError, grpc.aio.AioRpcError) as error:
                    found = [f"{type(error).__name__}: {error}"]
                for one in found:
                    yield row(case, sequences, one, batch1=batch1, as_shipped=as_shipped)
    except (ForepageError, StartError) as error:
        for case, sequences, batch1, as_shipped in wanted:
            failure = f"{type(error).__name__}: {error}"
            yield row(case, sequences, failure, batch1=batch1, as_shipped=as_shipped)


if __name__ == "__main__":
    raise SystemExit(main())
