"""Small hand-made files in the published formats."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.quality.published import FormatError, read_longbench, read_longmemeval, read_ruler

LONGMEMEVAL: dict[str, Any] = {
    "question_id": "gpt4_1",
    "question_type": "single-session-user",
    "question": "Which degree did I take?",
    "answer": "Botany",
    "question_date": "2023/05/30 (Tue) 22:10",
    "haystack_session_ids": ["a", "b"],
    "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/21 (Sun) 11:00"],
    "haystack_sessions": [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        [
            {"role": "user", "content": "I have a degree in Botany.", "has_answer": True},
            {"role": "assistant", "content": "Nice.", "has_answer": False},
        ],
    ],
    "answer_session_ids": ["b"],
}
LONGBENCH = {
    "_id": "66f3",
    "domain": "Single-Document QA",
    "sub_domain": "Legal",
    "difficulty": "easy",
    "length": "short",
    "question": "Who signed?",
    "choice_A": "Ada",
    "choice_B": "Bo",
    "choice_C": "Cy",
    "choice_D": "Di",
    "answer": "C",
    "context": "It was signed by Cy.",
}


def written(path: Path, records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def test_ruler_prompts_are_sent_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "niah_multivalue" / "validation.jsonl"
    path.parent.mkdir()
    prompt = "x" * 40_000 + " One is: 111. " + "y" * 40_000 + " One is: 222. What are all?"
    lines = [{"index": 5, "input": prompt, "outputs": ["111", "222"], "length": 20_000}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (document,) = read_ruler(path)
    (item,) = document.items
    assert (item.suite, item.document) == ("ruler_niah_multivalue", "5")
    assert [turn.text for turn in item.turns] == [prompt]
    assert item.score("111 and 222") == 1.0
    assert item.score("111") == 0.5
    assert item.depth == pytest.approx(0.75, abs=0.01)
    assert item.outside_tail is False
    assert item.length_tokens == 32_768


def test_ruler_reading_takes_any_answer_and_counting_has_no_evidence(tmp_path: Path) -> None:
    line = json.dumps({"index": 0, "input": "Two: b a", "outputs": ["a", "b"]})
    (tmp_path / "qa_1.jsonl").write_text(line)
    (tmp_path / "cwe.jsonl").write_text(line)
    (reading,) = read_ruler(tmp_path / "qa_1.jsonl")
    (counting,) = read_ruler(tmp_path / "cwe.jsonl")
    assert reading.items[0].score("b") == 1.0
    assert counting.items[0].score("b") == 0.5
    assert counting.items[0].depth is None


def test_longmemeval_takes_its_evidence_from_has_answer(tmp_path: Path) -> None:
    abstaining = {**LONGMEMEVAL, "question_id": "gpt4_2_abs", "answer": "It was not mentioned."}
    first, second = read_longmemeval(written(tmp_path / "s.json", [LONGMEMEVAL, abstaining]))
    (item,) = first.items
    prompt = item.turns[0].text
    assert "### Session 2:\nSession Date: 2023/05/21 (Sun) 11:00\n" in prompt
    assert "Current Date: 2023/05/30 (Tue) 22:10\nQuestion: Which degree did I take?\nAnswer:" in prompt
    assert item.depth == prompt.index("user: I have a degree") / len(prompt)
    assert item.score("You took Botany.") == 1.0
    assert item.question.kind == "single_session_user"
    assert second.items[0].score("You did not mention it.") == 1.0
    assert second.items[0].score("Botany") == 0.0


def test_longbench_is_multiple_choice(tmp_path: Path) -> None:
    (document,) = read_longbench(written(tmp_path / "data.json", [LONGBENCH]))
    (item,) = document.items
    assert "<text>\nIt was signed by Cy.\n</text>" in item.turns[0].text
    assert "\n(C) Cy\n" in item.turns[0].text
    assert item.score("The correct answer is (C).") == 1.0
    assert item.score("The correct answer is (A).") == 0.0
    assert item.depth is None


def test_braces_in_a_document_are_text(tmp_path: Path) -> None:
    (document,) = read_longbench(
        written(tmp_path / "data.json", [{**LONGBENCH, "context": "{question} {x}"}])
    )
    assert "<text>\n{question} {x}\n</text>" in document.items[0].turns[0].text


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ({}, "not a list"),
        ([{**LONGBENCH, "answer": None}], "record 0: answer must be a str, is NoneType"),
        ([{name: value for name, value in LONGBENCH.items() if name != "context"}], "record 0: context"),
    ],
)
def test_wrong_longbench_file_is_refused_by_field(tmp_path: Path, records: object, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        list(read_longbench(written(tmp_path / "data.json", records)))


def test_wrong_longmemeval_file_is_refused(tmp_path: Path) -> None:
    short = {**LONGMEMEVAL, "haystack_dates": []}
    with pytest.raises(FormatError, match="2 sessions with 0 dates"):
        list(read_longmemeval(written(tmp_path / "s.json", [short])))
    (tmp_path / "t.json").write_text("[")
    with pytest.raises(FormatError, match="not JSON"):
        list(read_longmemeval(tmp_path / "t.json"))


def test_wrong_ruler_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vt.jsonl").write_text('{"input": 3, "outputs": []}')
    with pytest.raises(FormatError, match="input must be a str"):
        list(read_ruler(tmp_path / "vt.jsonl"))
    (tmp_path / "fwe.jsonl").write_text("[]\n")
    with pytest.raises(FormatError, match="line 1 is not an object"):
        list(read_ruler(tmp_path / "fwe.jsonl"))
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(FormatError, match="named after a RULER task"):
        list(read_ruler(tmp_path / "other.jsonl"))
