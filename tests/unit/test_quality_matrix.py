"""A matrix over several endpoints: turns, shares of the work, stopping and going on."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from loadtest.quality.answers import Answer, AnswerFile
from loadtest.quality.arms import Arm
from loadtest.quality.endpoint import Endpoint
from loadtest.quality.matrix import CellPlan, Matrix, MatrixPlan, PlanError, taking_turns
from rigs.scripted_endpoint import ScriptedEndpoint

PLANS = Path(__file__).parents[2] / "loadtest" / "quality" / "plans"
SHORT = CellPlan(
    suites=["ruler_niah_single_1", "ruler_niah_single_2"],
    lengths=[2048],
    arms=[Arm.FULL, Arm.GUARDED],
    questions=8,
    per_document=2,
    budget_blocks=3,
)
LONG = CellPlan(suites=["ruler_niah_single_1"], lengths=[4096], arms=[Arm.FULL], questions=4, per_document=1)


async def run(
    endpoints: list[ScriptedEndpoint], path: Path, plan: MatrixPlan, *, stop_after: int | None = None
) -> tuple[list[Answer], bool]:
    seen: list[Answer] = []
    answers = AnswerFile(path)
    clients = [endpoint.client() for endpoint in endpoints]
    matrix = Matrix([Endpoint(client, "tiny") for client in clients], answers, 2, seen.append)
    if stop_after is not None:
        matrix._is_over = lambda: len(seen) >= stop_after  # type: ignore[method-assign]
    is_whole = await matrix.run(taking_turns(plan.cells(), 0))
    answers.close()
    for client in clients:
        await client.aclose()
    return seen, is_whole


def test_every_cell_of_the_plan_is_asked_once_and_endpoints_share_it(tmp_path: Path) -> None:
    endpoints = [ScriptedEndpoint(), ScriptedEndpoint()]
    plan = MatrixPlan(cell=[SHORT, LONG])
    seen, is_whole = asyncio.run(run(endpoints, tmp_path / "a.jsonl", plan))
    assert is_whole
    assert len(seen) == plan.num_answers == 2 * 8 * 2 + 4
    counts = Counter((one.suite, one.length_tokens, one.arm) for one in seen)
    assert set(counts.values()) == {8, 4}
    assert counts["ruler_niah_single_1", 4096, "full"] == 4
    assert len({(one.key, one.arm) for one in seen}) == len(seen)
    assert all(len(endpoint.bodies) > 4 for endpoint in endpoints)
    named = {body["forepage"].get("budget_blocks") for one in endpoints for body in one.bodies}
    assert named == {3, 8}, "a cell's own budget, or that of its length"


def test_whenever_it_stops_all_cells_have_about_the_same_share() -> None:
    cells = MatrixPlan(cell=[SHORT, LONG]).cells()
    given = Counter[tuple[str, int]]()
    for cell, document in taking_turns(cells, 0):
        given[cell.suite, cell.length_tokens] += len(document.items)
        shares = [given[one.suite, one.length_tokens] / one.plan.questions for one in cells]
        assert max(shares) - min(shares) <= 0.25
    assert set(shares) == {1.0}


def test_stopped_it_says_so_and_goes_on_where_it_was(tmp_path: Path) -> None:
    plan, path = MatrixPlan(cell=[SHORT, LONG]), tmp_path / "a.jsonl"
    first, is_whole = asyncio.run(run([ScriptedEndpoint()], path, plan, stop_after=10))
    assert not is_whole
    assert 10 <= len(first) < 16
    rest, is_whole = asyncio.run(run([ScriptedEndpoint()], path, plan))
    assert is_whole
    assert len(first) + len(rest) == plan.num_answers
    assert not {(one.key, one.arm) for one in first} & {(one.key, one.arm) for one in rest}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[cell]]\nlengths = [2048]\narms = ['full']\nquestions = 0", "questions"),
        ("[[cell]]\nlengths = [2048]\narms = ['full']\nquestions = 1\nsuites = ['x']", "no such suite: x"),
        ("[[cell]]\nlengths = [2048]\narms = ['half']\nquestions = 1", "arms"),
        ("[[cell]]\nlength = 1", "length"),
        ("cell = 3 = 4", "plan.toml"),
    ],
)
def test_a_plan_that_cant_be_run_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=said):
        MatrixPlan.read(path)


def test_the_reports_plan_asks_as_many_as_the_aims_want() -> None:
    plan = MatrixPlan.read(PLANS / "report.toml")
    wanted = {8192: 800, 32_768: 800, 65_536: 800, 131_072: 400, 262_144: 400, 524_288: 200}
    found = {
        cell.length_tokens: cell.plan.questions for cell in plan.cells() if cell.length_tokens < 1_000_000
    }
    assert found == wanted
    assert {cell.length_tokens for cell in plan.cells()} - set(wanted) == {1_048_000}
