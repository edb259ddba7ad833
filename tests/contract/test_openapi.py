"""The HTTP contract: what the app says of itself is what is committed, and errors are worded one way.

`python tests/contract/test_openapi.py` writes the snapshot again, after a change that is meant.
"""

import json
from pathlib import Path
from typing import Any

import fastapi
import pytest

from forepage.gateway.admission import Admission
from forepage.gateway.api_keys import OPEN_PATHS
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
        ("/v1/models/{model}", "get"),
        ("/health/live", "get"),
        ("/health/ready", "get"),
        ("/metrics", "get"),
        ("/version", "get"),
        ("/tokenize", "post"),
        ("/detokenize", "post"),
        ("/ping", "get"),
        ("/load", "get"),
    }


def test_generations_answer_whole_or_in_events(document: dict[str, Any]) -> None:
    for path in OPERATIONS:
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "413", "429", "500", "503", "504"} < set(responses)


def test_errors_have_one_shape_and_say_when_to_come_back(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for operation in item.values():
            for status, response in operation["responses"].items():
                if status == "200" or path == "/health/ready":
                    continue
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorReply"}
                assert "x-request-id" in response["headers"]
                assert ("retry-after" in response["headers"]) == (status in ("429", "503"))


def test_every_field_that_can_be_sent_is_described(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    wanted = [
        operation["requestBody"]["content"]["application/json"]["schema"]
        for item in document["paths"].values()
        for operation in item.values()
        if "requestBody" in operation
    ]
    seen: set[str] = set()
    while wanted:
        part = wanted.pop()
        wanted += [value for value in part.values() if isinstance(value, dict)]
        wanted += [
            item
            for value in part.values()
            if isinstance(value, list)
            for item in value
            if isinstance(item, dict)
        ]
        name = str(part.get("$ref", "")).rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            wanted.append(schemas[name])
    assert {"ChatBody", "TextBody", "ToolFields", "NamedSchema", "ResidencyFields"} < seen
    assert [
        f"{name}.{field}"
        for name in sorted(seen)
        for field, said in schemas[name].get("properties", {}).items()
        if not said.get("description")
    ] == []


def test_what_asks_for_a_key_says_so(document: dict[str, Any]) -> None:
    (scheme,) = document["components"]["securitySchemes"]
    for path, item in document["paths"].items():
        for operation in item.values():
            is_keyed = path not in OPEN_PATHS
            assert operation.get("security", []) == ([{scheme: []}] if is_keyed else [])
            assert ("401" in operation["responses"]) == is_keyed


if __name__ == "__main__":
    text = json.dumps(openapi(), indent=1, ensure_ascii=False, sort_keys=True)
    SNAPSHOT.write_text(text + "\n", encoding="utf-8")
