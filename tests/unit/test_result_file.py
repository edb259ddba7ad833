"""The head that every result file has, and that the committed ones have it."""

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from forepage.checkout import commit_of_checkout
from loadtest.result_file import result_file

ROOT = Path(__file__).parents[2]
HEAD = ["what", "command", "commit", "date", "device", "ceilings", "config", "why", "rows"]


def test_it_says_what_how_where_and_when() -> None:
    found = result_file(
        "x", command="python -m x", device={"gpu": None}, config={"a": 1}, why={"ceilings": "-"}, rows=[{}]
    )
    assert list(found) == HEAD
    assert found["rows"] == [{}]
    assert datetime.fromisoformat(found["date"]).utcoffset() is not None
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    assert (found["commit"] or "").removesuffix("-dirty") == commit
    assert found["why"].keys() == ({"ceilings"} if commit else {"ceilings", "commit"})


def test_a_commit_whose_files_were_changed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    source = tmp_path / "checkout.py"
    source.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr("forepage.checkout.__file__", str(source))
    clean = commit_of_checkout()
    source.write_text("2")
    assert clean is not None
    assert len(clean) == 40
    assert commit_of_checkout() == f"{clean}-dirty"


def test_without_git_it_says_why_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = result_file("x", command="y", device={}, config={}, ceilings={"link": 1}, why={})
    assert found["commit"] is None
    assert found["why"] == {"commit": "not run in a git work tree"}
    assert found["ceilings"] == {"link": 1}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "loadtest/results").glob("*.json")), ids=lambda path: path.name
)
def test_a_committed_file_has_it(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [name for name in found if name in HEAD] == HEAD
    missing = {name for name in HEAD if found[name] is None}
    assert missing <= found["why"].keys()
