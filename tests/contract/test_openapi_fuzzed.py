"""The app against its own OpenAPI document: whatever is asked, the answer is one that the document declares.

Requests are made by schemathesis: those at the limits of the schema, then drawn ones, some that fit it and
some that don't. The same ones each time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig

from forepage.gateway.api_keys import new_key
from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import MODEL, FakeWorker, finished, scored, started
from rigs.gateway_thread import gateway_thread
from rigs.gateways import key_file

SNAPSHOT = Path(__file__).parent / "openapi.json"
BODIES = {
    "/v1/chat/completions": "ChatBody",
    "/v1/completions": "TextBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
}
SHORT_S = 30.0
"""A deadline below this may pass on a busy machine."""
KEY, KEPT = new_key("fuzz")
CONFIG = SchemathesisConfig.from_dict(
    {
        "generation": {"deterministic": True, "max-examples": 30, "database": "none"},
        "suppress-health-check": ["too_slow"],  # how fast requests are drawn is the machine's matter
        "auth": {"openapi": {"ApiKey": {"bearer": KEY}}},
        "checks": {
            "positive_data_acceptance": {"enabled": False},  # rules between fields are in no schema
            "not_a_server_error": {"expected-statuses": ["2xx", "4xx", 504]},  # 504: if it was asked for
        },
    }
)


def document() -> dict[str, Any]:
    """The committed one, in which the only model is the one that is served: any other is a 404."""
    read: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    for name in BODIES.values():
        body = read["components"]["schemas"][name]
        body["properties"]["model"] = {"enum": [MODEL]}
        body["examples"] = [{**example, "model": MODEL} for example in body["examples"]]
    return read


schema = schemathesis.openapi.from_dict(document(), config=CONFIG)
answered: defaultdict[str, Counter[int | str]] = defaultdict(Counter)


async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """A few tokens, as many as may be, with log-probabilities if they are asked for."""
    ids = list(b"yes.")[: request.sampling.max_tokens]
    yield started(request)
    for token in ids:
        yield scored(request, [token])
    yield finished(request, len(ids))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = key_file(tmp_path_factory.mktemp("keys"), KEPT)
    with gateway_thread(lambda: FakeWorker(script=script), api_keys=keys) as served:
        yield served
    for path_asked, statuses in answered.items():
        wanted = {200, 400, 401} if path_asked in BODIES else {200}
        assert wanted <= set(statuses) or "{" in path_asked, (
            f"{path_asked} got {statuses}: that proves little"
        )
        assert statuses["events"] or "completions" not in path_asked


@schema.parametrize()
def test_every_answer_is_declared(case: schemathesis.Case[Any], url: str) -> None:
    reply = case.call_and_validate(base_url=url)
    if case.method.upper() == case.operation.method.upper():
        assert str(reply.status_code) in case.operation.definition.raw["responses"], "declared by name"
        answered[case.operation.path][reply.status_code] += 1
    if reply.status_code == 504:
        assert isinstance(case.body, dict)
        assert float(str(case.body["timeout_s"])) < SHORT_S
    if "text/event-stream" in reply.headers["content-type"][0]:
        *chunks, done = [line for line in reply.text.split("\n") if line]
        assert done == "data: [DONE]"
        assert all("choices" in json.loads(chunk.removeprefix("data: ")) for chunk in chunks)
        answered[case.operation.path]["events"] += 1
