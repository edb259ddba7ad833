"""The command as a user runs it, against a real HTTP server that knows the answers."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.quality.__main__ import app
from loadtest.quality.answers import read_answers

KEY = re.compile(r"for (\S+) (?:is|reads)[: ]+(\d{7})")


class Handler(BaseHTTPRequestHandler):
    """Finds a needle of RULER's form; `recency` and `random` have lost it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"data": [{"id": "finder"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "forepage" not in body:
            self.send_error(400, "the extension is needed")
            return
        document, _, question = body["messages"][0]["content"].rpartition("\n\n")
        found = dict(KEY.findall(document))
        value = next((value for key, value in found.items() if key in question), "unknown")
        has_lost_it = "plan_source" in body["forepage"]
        message = {"content": "unknown" if has_lost_it else f"It is {value}."}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "forepage": {"kv_footprint": 0.2}}
        self._send({"choices": [{"message": message}], "usage": usage})

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the test's output."""

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def base_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_run_and_report_measure_every_arm(base_url: str, tmp_path: Path) -> None:
    answers = tmp_path / "raw" / "a.jsonl"
    suite = ["--suite", "ruler_niah_single_1", "--length", "2048", "--length", "12000", "--questions", "12"]
    suite += ["--per-document", "1"]  # many documents: about half of them are worded as RULER words them
    command = ["run", "--base-url", base_url, "--out", str(answers), *suite]
    for _ in range(2):  # the second finds everything done
        ran = CliRunner().invoke(app, command)
        assert ran.exit_code == 0, ran.output
        assert len(answers.read_text().splitlines()) == 2 * 12 * 6
    assert len(list(read_answers(answers))) == 144
    ran = CliRunner().invoke(app, ["report", str(answers), "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    right = {(row["length_tokens"], row["arm"]): row["accuracy"] for row in rows if row["subset"] == "all"}
    for length in (2048, 12_000):
        assert right[length, "full"] == right[length, "guarded"] == right[length, "exact"] > 0.1
        assert right[length, "random"] == right[length, "recency-only"] == 0.0
    assert any(row["subset"] == "outside_last_8k" and row["length_tokens"] == 12_000 for row in rows)


def test_run_that_fails_says_so_and_exits_with_one(base_url: str, tmp_path: Path) -> None:
    command = [
        "run",
        "--base-url",
        base_url,
        "--out",
        str(tmp_path / "a.jsonl"),
        "--plain",
        "--questions",
        "1",
    ]
    ran = CliRunner().invoke(app, [*command, "--suite", "ruler_vt", "--length", "1024"])
    assert ran.exit_code == 1
    assert "1 requests failed" in ran.output
