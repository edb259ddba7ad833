"""A run against a scripted endpoint: what is asked, how often, and what is written down."""

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.quality.answers import Answer, AnswerFile, read_answers
from loadtest.quality.arms import Arm, residency_fields
from loadtest.quality.endpoint import Endpoint, first_model
from loadtest.quality.items import Document, generated
from loadtest.quality.runner import Runner, RunSettings
from rigs.scripted_endpoint import ScriptedEndpoint


def documents(count: int = 3, per_document: int = 2) -> list[Document]:
    return list(
        generated("ruler_niah_single_1", 2048, num_questions=count, per_document=per_document, first_seed=0)
    )


async def run(
    endpoint: ScriptedEndpoint, path: Path, asked: list[Document], *arms: Arm, **settings: Any
) -> list[Answer]:
    seen: list[Answer] = []
    answers = AnswerFile(path)
    async with endpoint.client() as client:
        runner = Runner(Endpoint(client, "tiny"), answers, RunSettings(arms, 2, **settings), seen.append)
        await runner.run(asked)
    answers.close()
    return seen


async def test_every_question_is_asked_in_every_arm_once(tmp_path: Path) -> None:
    asked = documents()
    right = {item.turns[-1].text: item.question.answer for document in asked for item in document.items}
    endpoint = ScriptedEndpoint(right)
    await run(endpoint, tmp_path / "a.jsonl", asked, Arm.FULL, Arm.RANDOM, budget_blocks=7, threshold=0.25)
    counts = Counter((body["messages"][0]["content"], body["forepage"]["mode"]) for body in endpoint.bodies)
    assert len(counts) == 6
    assert set(counts.values()) == {1}
    fields = [body["forepage"] for body in endpoint.bodies if body["forepage"]["mode"] == "lookahead"]
    assert (
        fields
        == [
            {
                "mode": "lookahead",
                "plan_source": "random",
                "budget_blocks": 7,
                "threshold": 0.25,
                "audit": True,
            }
        ]
        * 3
    )
    assert {(body["model"], body["temperature"]) for body in endpoint.bodies} == {("tiny", 0)}
    found = list(read_answers(tmp_path / "a.jsonl"))
    assert [one.score for one in found] == [1.0] * 6
    assert found[0].residency == {"late_plans": 0}


async def test_first_question_of_a_document_is_asked_before_the_others(tmp_path: Path) -> None:
    asked = documents(count=6, per_document=6)
    endpoint = ScriptedEndpoint()
    await run(endpoint, tmp_path / "a.jsonl", asked, Arm.FULL)
    assert endpoint.bodies[0]["messages"][0]["content"] == asked[0].items[0].turns[0].text


async def test_second_run_asks_only_what_is_missing(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.jsonl", documents()
    await run(ScriptedEndpoint(), path, asked, Arm.FULL)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    endpoint = ScriptedEndpoint()
    again = await run(endpoint, path, asked, Arm.FULL, Arm.EXACT)
    assert len(endpoint.bodies) == 4
    assert sorted(one.arm for one in again) == ["exact", "exact", "exact", "full"]
    assert len(list(read_answers(path))) == 6


async def test_busy_server_is_asked_again(tmp_path: Path) -> None:
    endpoint = ScriptedEndpoint()
    endpoint.failures = [httpx.Response(503, headers={"retry-after": "0"}), httpx.ConnectError("refused")]
    (answer,) = await run(endpoint, tmp_path / "a.jsonl", documents(count=1), Arm.GUARDED)
    assert answer.error is None
    assert len(endpoint.bodies) == 1


async def test_refused_request_is_an_error_and_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    path, endpoint = tmp_path / "a.jsonl", ScriptedEndpoint()
    endpoint.failures = [httpx.Response(400, text="context_length_exceeded")]
    (failed,) = await run(endpoint, path, documents(count=1), Arm.FULL)
    assert failed.error == "400: context_length_exceeded"
    assert failed.score == 0.0
    await run(endpoint, path, documents(count=1), Arm.FULL)
    (kept,) = read_answers(path)
    assert kept.error is None


async def test_plain_endpoint_gets_no_extension(tmp_path: Path) -> None:
    endpoint = ScriptedEndpoint()
    await run(endpoint, tmp_path / "a.jsonl", documents(count=1), Arm.FULL, plain=True)
    assert "forepage" not in endpoint.bodies[0]


async def test_model_is_the_first_that_is_served() -> None:
    async with ScriptedEndpoint().client() as client:
        assert await first_model(client) == "tiny"


async def test_model_is_waited_for_while_none_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.quality.endpoint.MODEL_POLL_S", 0.0)
    answers = iter([[], [], [{"id": "late"}]])
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={"data": next(answers)}))
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        assert await first_model(client) == "late"


@pytest.mark.parametrize(
    ("arm", "mode", "source"),
    [
        (Arm.FULL, "full", None),
        (Arm.GUARDED, "guarded", None),
        (Arm.RECENCY_ONLY, "lookahead", "recency"),
        (Arm.RANDOM, "lookahead", "random"),
    ],
)
def test_arm_is_a_mode_and_a_source(arm: Arm, mode: str, source: str | None) -> None:
    fields = residency_fields(arm, budget_blocks=None, threshold=None)
    assert (fields["mode"], fields.get("plan_source"), fields["audit"]) == (mode, source, True)
    assert None not in fields.values()
