"""The HTTP contract: what the app says of itself is what is committed, and errors are worded one way.

`python tests/contract/test_openapi.py` writes the snapshot again, after a change that is meant.
"""

import json
from pathlib import Path
from typing import Any

import fastapi
import pytest

from forepage.gateway.admission import Admission
from forepage.gateway.app import create_app
from forepage.gateway.routes import OPERATIONS
from forepage.gateway.worker_directory import FixedWorkers, WorkerDirectory
from forepage.settings import SEEDED_MODEL, GatewaySettings
from forepage.telemetry import open_telemetry
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording

SNAPSHOT = Path(__file__).parent / "openapi.json"


def make_app() -> fastapi.FastAPI:
    telemetry = open_telemetry("gateway", instance_id="contract")
    app = create_app(
        GatewaySettings(),
        tokenizer=Tokenizer.load(SEEDED_MODEL),
        wording=Wording.load(SEEDED_MODEL),
        directory=WorkerDirectory(FixedWorkers(()), telemetry),
        admission=Admission(1),
        telemetry=telemetry,
    )
    telemetry.close()
    return app


def openapi() -> dict[str, Any]:
    return make_app().openapi()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi()


def test_document_is_the_committed_one(document: dict[str, Any]) -> None:
    assert document == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_endpoint_is_there(document: dict[str, Any]) -> None:
    paths = {(path, method) for path, item in document["paths"].items() for method in item}
    assert paths == {
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"),
        ("/v1/models", "get"),
        ("/health/live", "get"),
        ("/health/ready", "get"),
        ("/metrics", "get"),
        ("/version", "get"),
        ("/tokenize", "post"),
        ("/detokenize", "post"),
        ("/ping", "get"),
        ("/load", "get"),
    }


def test_generations_answer_errors_in_one_shape(document: dict[str, Any]) -> None:
    for path in OPERATIONS:
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "4XX", "5XX"}
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        for status in ("4XX", "5XX"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorReply"}


if __name__ == "__main__":
    text = json.dumps(openapi(), indent=1, ensure_ascii=False, sort_keys=True)
    SNAPSHOT.write_text(text + "\n", encoding="utf-8")
