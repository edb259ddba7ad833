"""`python -m loadtest.load` as a user runs it, against a real HTTP server that streams answers."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from loadtest.load.shapes import SHAPES

KEY = "sk-hush"
LENGTH = 1024


class Server(ThreadingHTTPServer):
    """Counts requests; answers the first ones with `first_status`."""

    first_status = 200
    num_asked = 0
    keys: set[str]
    answers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    """Streams the right answer in three pieces."""

    server: Server

    def do_GET(self) -> None:
        data = json.dumps({"data": [{"id": "finder"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.num_asked += 1
        self.server.keys.add(self.headers["authorization"] or "")
        if self.server.num_asked <= 2 and self.server.first_status != 200:
            data = b'{"error": {"code": "rate_limit_exceeded"}}'
            self.send_response(self.server.first_status)
            self.send_header("retry-after", "0")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        answer = self.server.answers[body["messages"][0]["content"]]
        for piece in (answer[:4], answer[4:8], answer[8:]):
            self._event({"choices": [{"delta": {"content": piece}}]})
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "forepage": {"kv_footprint": 0.25}}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the test's output."""

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


def right_answers() -> dict[str, str]:
    """Of every question that a run of `load` asks, by its message."""
    shape = SHAPES["ci"].scaled(seconds=None, users=1.0, length_tokens=LENGTH, num_documents=None)
    asked = [one.items[0] for one in islice(shape.conversations(0), 500)]
    return {item.turns[-1].text: item.question.answer for item in asked}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        found.keys, found.answers = set(), right_answers()
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def load(server: Server, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command = [sys.executable, "-m", "loadtest.load", "run", "--base-url", url, "--out", str(out)]
    options = ["--shape", "ci", "--seconds", "1.5", "--length", str(LENGTH), *arguments]
    return subprocess.run(
        [*command, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )


def test_a_run_leaves_one_json_one_table_and_one_picture(server: Server, tmp_path: Path) -> None:
    done = load(server, tmp_path, "--api-key", KEY)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"load-ci.json", "load-ci.md", "load-ci.png"}
    assert (tmp_path / "load-ci.png").read_bytes().startswith(b"\x89PNG")
    assert "device not named (--device)" in (tmp_path / "load-ci.md").read_text()
    result = json.loads((tmp_path / "load-ci.json").read_text())
    [row] = result["rows"]
    assert row["requests"] == row["answered"] == server.num_asked > 2
    assert row["accuracy"] == 1.0
    assert (row["kv_footprint"], row["failed"], row["refused"]) == (0.25, 0, 0)
    assert 0 < row["ttft_p50_ms"] <= row["total_p50_ms"]
    assert result["config"]["forepage"]["mode"] == "guarded"
    assert result["command"].startswith("python -m loadtest.load run --base-url")
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(result) + done.stdout + done.stderr


def test_refusals_are_counted_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.first_status = 429
    done = load(server, tmp_path, "--plain", "--name", "busy", "--device", '{"gpu": "H100"}')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "busy.json").read_text())
    assert result["rows"][0]["refused"] == 2
    assert result["device"] == {"gpu": "H100"}
    assert "H100" in (tmp_path / "busy.md").read_text()
    assert result["config"]["forepage"] is None


def test_a_failure_is_exit_code_1(server: Server, tmp_path: Path) -> None:
    server.first_status = 500
    done = load(server, tmp_path)
    assert done.returncode == 1
    assert "failed: {'rate_limit_exceeded': 2}" in done.stderr


def test_unknown_shape_is_refused_with_those_there_are(server: Server, tmp_path: Path) -> None:
    done = load(server, tmp_path, "--shape", "wave")
    assert done.returncode == 2
    assert "mostly-recent" in done.stderr


def test_documents_too_short_for_a_shapes_questions_are_refused(server: Server, tmp_path: Path) -> None:
    """All of 8K tokens are the last 8K: nothing in them needs the past."""
    done = load(server, tmp_path, "--shape", "mostly-recent", "--length", "8192")
    assert done.returncode == 2
    assert "--length" in done.stderr
    assert "no questions about older text" in " ".join(done.stderr.split())
    assert server.num_asked == 0
