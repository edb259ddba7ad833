"""Every decoder of bytes from outside: what it can't take is refused by its own error, in little memory.

HTTP bodies: contract/test_openapi_fuzzed. Records of the cold pool: test_coldpool_codec. Tensors of
checkpoints: test_checkpoint_laws.
"""

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.errors import IntegrityError, ModelFormatError, RequestError
from forepage.frames import DirectoryFrame, Frame, PlanFrame, WorkerFrame
from forepage.gateway.api_keys import new_key, read_keys
from forepage.index.question import parse_request
from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.memory_indexer import read_indexer_config
from forepage.model.spec import ModelSpec, read_config
from forepage.rpc import index_pb2, worker_pb2
from forepage.settings import SEEDED_MODEL, WorkerSettings
from forepage.settings_environment import SettingsError
from forepage.span_log import StoredSpan, read_spans
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from forepage.worker.request import Request
from rigs.index_limits import LIMITS
from rigs.outside import altered, as_json, damaged, nested_json

MOST_BYTES = 64 << 20
"""Of Python's own memory; inputs here are at most some hundred KB."""
bounded = settings(max_examples=120, deadline=None, derandomize=True)
FRAMES: list[Frame] = [
    PlanFrame("s", 1, 2, 3_000, (4, 5), (0.5, 0.25), 2, "00-0-0-00"),
    DirectoryFrame("host", "default", "arena", 5, 6, 1, 0, 0, 1, 4_096, 2**63),
    WorkerFrame("w", "h:1", "model", "fp", 4_096, draining=False),
]
CONFIG = json.loads((SEEDED_MODEL / "config.json").read_text())
TOKENIZER = json.loads((SEEDED_MODEL / "tokenizer.json").read_text())


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails when more was allocated at once than any of these inputs can need."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def refused_or_taken(act: Callable[[], object], *errors: type[Exception]) -> None:
    """It gives something, or one of its own errors, whose text is short enough to be read."""
    said = "taken"
    try:
        act()
    except errors as error:
        said = str(error)
    assert 0 < len(said) < 10_000


@bounded
@given(st.sampled_from(FRAMES).flatmap(lambda frame: damaged(frame.encode()).map(lambda b: (type(frame), b))))
def test_frames(case: tuple[type[Frame], bytes]) -> None:
    kind, data = case
    refused_or_taken(lambda: kind.decode(data), IntegrityError)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4 G items
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # 4 GB of bytes
        b"\x91" * 200_000,
        b"\x81\xa1a" * 100_000,
        msgpack.packb({"frame": "plan", "schema_version": 1, "block_idx": [0] * 500_000}),
    ],
)
def test_frames_that_claim_more_than_they_hold(bomb: bytes) -> None:
    kinds: list[type[Frame]] = [type(frame) for frame in FRAMES]
    for kind in kinds:
        with little_memory(), pytest.raises(IntegrityError):
            kind.decode(bomb)


GENERATE = worker_pb2.GenerateRequest(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    sampling=worker_pb2.Sampling(max_tokens=4, temperature=1.0, top_p=0.5, seed=7, stop_token_ids=[9]),
    residency=worker_pb2.Residency(mode="RESIDENCY_MODE_GUARDED", min_recall=0.5, budget_blocks=3),
    cache_salt="s",
    answered_token_ids=[5],
    priority=-3,
)
LOOKAHEAD = index_pb2.LookaheadRequest(
    request_id=1,
    stamp=index_pb2.Stamp(sequence_id="s", incarnation=2, interval=3),
    num_tokens=3_000,
    arena_ids=bytes(44),
    generations=bytes(88),
    predict=index_pb2.Predict(num_candidates=9, budget_blocks=5, position=2_999, hidden=bytes(64)),
)


def parsed_or_not_proto(message: Any, data: bytes) -> bool:
    """What gRPC itself would let through to us."""
    try:
        message.ParseFromString(data)
    except (DecodeError, ValueError):
        return False
    return True


@bounded
@given(damaged(GENERATE.SerializeToString()))
def test_requests_to_a_worker(data: bytes) -> None:
    message = worker_pb2.GenerateRequest()
    if parsed_or_not_proto(message, data):
        settings_ = WorkerSettings(max_context_tokens=4_096)
        refused_or_taken(lambda: Request.parse(message, settings_, vocab_size=256, eos=0), RequestError)


@bounded
@given(damaged(LOOKAHEAD.SerializeToString()))
def test_questions_to_the_index(data: bytes) -> None:
    message = index_pb2.LookaheadRequest()
    if parsed_or_not_proto(message, data):
        refused_or_taken(lambda: parse_request(message, LIMITS), RequestError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the seeded model that tests write into."""
    target = tmp_path_factory.mktemp("model")
    shutil.copytree(SEEDED_MODEL, target, dirs_exist_ok=True)
    return target


def read_spec(folder: Path) -> None:
    """All that is read of a config before weights are."""
    config = read_config(folder)
    ModelSpec.from_config(config)
    KvGeometry.from_config(config, KvFormat.FP8)


@bounded
@given(altered(CONFIG))
def test_configs(folder: Path, config: Any) -> None:
    (folder / "config.json").write_bytes(as_json(config))
    refused_or_taken(lambda: read_spec(folder), ModelFormatError)


@bounded
@given(altered(TOKENIZER))
def test_tokenizers(folder: Path, tokenizer: Any) -> None:
    (folder / "tokenizer.json").write_bytes(as_json(tokenizer))
    refused_or_taken(lambda: Tokenizer.load(folder).encode_text("a text"), ModelFormatError)


def test_a_token_of_no_bytes_is_named(tmp_path: Path) -> None:
    model = {**TOKENIZER["model"], "vocab": {**TOKENIZER["model"]["vocab"], "\u3042": 9_999}}
    (tmp_path / "tokenizer.json").write_bytes(as_json({**TOKENIZER, "model": model}))
    with pytest.raises(ModelFormatError, match="no byte"):
        Tokenizer.load(tmp_path)


def test_an_id_beyond_every_vocabulary_costs_no_memory(tmp_path: Path) -> None:
    added = [{**token, "id": 2**40} for token in TOKENIZER["added_tokens"]]
    (tmp_path / "tokenizer.json").write_bytes(as_json({**TOKENIZER, "added_tokens": added}))
    with little_memory(), pytest.raises(ModelFormatError, match="added_tokens"):
        Tokenizer.load(tmp_path)


@bounded
@given(damaged((SEEDED_MODEL / "memory_indexer.json").read_bytes()))
def test_memory_indexers_configs(folder: Path, data: bytes) -> None:
    (folder / "memory_indexer.json").write_bytes(data)
    spec = ModelSpec.from_config(CONFIG)
    refused_or_taken(lambda: read_indexer_config(folder, spec, None), ModelFormatError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "memory_indexer.json"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"null", b"[]", b"\x00" * 1_000, nested_json()])
def test_files_of_a_model_folder_that_are_something_else(tmp_path: Path, name: str, data: bytes) -> None:
    shutil.copytree(SEEDED_MODEL, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(data)
    read: Callable[[], object] = {
        "config.json": lambda: read_spec(tmp_path),
        "tokenizer.json": lambda: Tokenizer.load(tmp_path),
        "memory_indexer.json": lambda: read_indexer_config(tmp_path, ModelSpec.from_config(CONFIG), None),
    }[name]
    with little_memory(), pytest.raises(ModelFormatError):
        read()


@bounded
@given(st.binary(max_size=300))
def test_wordings(folder: Path, data: bytes) -> None:
    (folder / "tools_prompt.txt").write_bytes(data)
    refused_or_taken(lambda: Wording.load(folder), ModelFormatError)


@bounded
@given(damaged((new_key("ann")[1].model_dump_json(exclude_none=True) + "\n").encode()))
def test_files_of_keys(folder: Path, data: bytes) -> None:
    path = folder / "keys.jsonl"
    path.write_bytes(data)
    refused_or_taken(lambda: read_keys(path), SettingsError)


SPAN = StoredSpan("x", "gateway", "a" * 32, "b" * 16, None, 1, 2, None, {"n": 1})
LINES = (json.dumps(vars(SPAN)) + "\n").encode() * 3


@bounded
@given(damaged(LINES))
def test_span_logs(folder: Path, data: bytes) -> None:
    (folder / "gateway-0.jsonl").write_bytes(data)
    assert len(list(read_spans(folder))) <= 4


def test_a_span_log_nested_without_end_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "gateway-0.jsonl").write_bytes(nested_json() + b"\n")
    assert list(read_spans(tmp_path)) == []
