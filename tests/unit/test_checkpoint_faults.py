"""A checkpoint that is not whole, not ours or not sound is refused with the tensor's and the file's name."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint
from forepage.model.checkpoint_reader import CheckpointReader
from forepage.model.safetensors_header import read_header
from forepage.model.spec import ModelSpec
from forepage.model.weights import load_or_seed
from rigs.checkpoint_writer import INDEX_FILE, stored_tensors, write_checkpoint
from rigs.parity_configs import MIXED

CONFIG: dict[str, object] = {
    **MIXED,
    "num_hidden_layers": 2,
    "compress_ratios": [4, 128, 0],
    "n_routed_experts": 2,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
SPEC = ModelSpec.from_config(CONFIG)
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FP8, FP4 = "layers.0.attn.wo_a", "layers.0.ffn.experts.1.w2"


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    """A whole checkpoint's tensors."""
    return stored_tensors(CONFIG)


def refusal(folder: Path, spec: ModelSpec = SPEC) -> str:
    """What a load of the folder says."""
    with pytest.raises(ModelFormatError) as caught:
        load_or_seed(folder, spec, dtype=torch.float32, device=torch.device("cpu"))
    return str(caught.value)


@dataclass(frozen=True)
class Fault:
    """A change to the stored tensors, and what the refusal must say beside the file's name."""

    id: str
    change: Callable[[dict[str, Tensor]], object]
    says: tuple[str, ...]
    file: str = FIRST


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


FAULTS = [
    Fault("scale missing", drop(f"{FP8}.scale"), ("1 tensors are missing", f"{FP8}.scale"), file=""),
    Fault("expert missing", drop(f"{FP4}.weight"), (f"unexpected tensor {FP4}.scale",)),
    Fault(
        "scale of a plain tensor",
        put(f"{FP8}.weight", torch.zeros(64, 256)),
        (f"unexpected tensor {FP8}.scale", f"{FP8}.weight is F32"),
    ),
    Fault(
        "fp8 scale misshapen",
        put(f"{FP8}.scale", torch.zeros(2, 2).to(torch.float8_e8m0fnu)),
        (f"{FP8}.scale has shape (2, 2), not (1, 2)",),
    ),
    Fault(
        "fp4 scale misshapen",
        put(f"{FP4}.scale", torch.zeros(128, 1).to(torch.float8_e8m0fnu)),
        (f"{FP4}.scale has shape (128, 1), not (128, 2)",),
    ),
    Fault(
        "fp4 not packed",
        put(f"{FP4}.weight", torch.zeros(128, 64, dtype=torch.int8)),
        (f"{FP4}.weight has shape (128, 64), not (128, 32)",),
    ),
    Fault(
        "fp32 scales", put(f"{FP8}.scale", torch.zeros(1, 2)), (f"{FP8}.scale has dtype F32, not F8_E8M0",)
    ),
    Fault(
        "fp4 unsigned",
        put(f"{FP4}.weight", torch.zeros(128, 32, dtype=torch.uint8)),
        (f"{FP4}.weight has dtype U8",),
    ),
    Fault(
        "other fp8",
        put(f"{FP8}.weight", torch.zeros(64, 256).to(torch.float8_e5m2)),
        (f"{FP8}.weight has dtype F8_E5M2",),
    ),
    Fault(
        "fp4 attention",
        put(f"{FP8}.weight", torch.zeros(64, 128, dtype=torch.int8)),
        (f"{FP8}.weight has dtype I8",),
    ),
    Fault(
        "float ids",
        put("layers.0.ffn.gate.tid2eid", torch.zeros(300, 2)),
        ("tid2eid has dtype F32, not one of I64",),
    ),
    Fault(
        "expert too many",
        put("layers.0.ffn.gate.tid2eid", torch.full((300, 2), 99)),
        ("layers.0.ffn.gate.tid2eid names expert 99, the model has",),
        file=FIRST,
    ),
    Fault(
        "negative expert",
        put("layers.0.ffn.gate.tid2eid", torch.full((300, 2), -1)),
        ("layers.0.ffn.gate.tid2eid names expert -1",),
        file=FIRST,
    ),
    Fault(
        "layer too many",
        put("layers.2.attn_norm.weight", torch.zeros(128)),
        ("unexpected tensor layers.2.attn_norm.weight",),
        file=LAST,
    ),
    Fault(
        "two names",
        put("model.embed.weight", torch.zeros(300, 128)),
        ("embed.weight", "another file"),
        file=LAST,
    ),
    Fault(
        "draft stage too many",
        put("mtp.1.norm.weight", torch.zeros(128)),
        ("mtp.1.norm.weight", "announces 1 draft blocks", "DSpark"),
        file=LAST,
    ),
    Fault(
        "dspark",
        put("mtp.0.dspark_head.weight", torch.zeros(1)),
        ("mtp.0.dspark_head.weight", "DSpark"),
        file=LAST,
    ),
    Fault(
        "engram", put("layers.0.engram.table", torch.zeros(1)), ("layers.0.engram.table", "V4.1"), file=FIRST
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_wrong_tensor_is_named_with_its_file(tmp_path: Path, stored: dict[str, Tensor], fault: Fault) -> None:
    tensors = dict(stored)
    fault.change(tensors)
    write_checkpoint(tmp_path, CONFIG, tensors, num_shards=2)
    said = refusal(tmp_path)
    for words in (str(tmp_path / fault.file), *fault.says):
        assert words in said


def test_draft_block_that_the_config_lacks_is_unexpected(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, CONFIG, stored, num_shards=2)
    spec = ModelSpec.from_config({**CONFIG, "num_nextn_predict_layers": 0})
    assert "unexpected tensor mtp.0.attn.attn_sink" in refusal(tmp_path, spec)


@pytest.fixture
def written(tmp_path: Path, stored: dict[str, Tensor]) -> Path:
    """A sound checkpoint, to be damaged."""
    write_checkpoint(tmp_path, CONFIG, stored, num_shards=2)
    return tmp_path


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / INDEX_FILE
    body = json.loads(path.read_text())
    change(body["weight_map"])
    path.write_text(json.dumps(body))


def test_missing_shard_is_named_with_a_tensor_of_it(written: Path) -> None:
    (written / LAST).unlink()
    said = refusal(written)
    assert str(written / LAST) in said
    assert "it holds layers.1." in said


def test_index_without_any_shard_is_not_a_seeded_folder(written: Path) -> None:
    for file in (FIRST, LAST):
        (written / file).unlink()
    seeded = ModelSpec.from_config({**CONFIG, "forepage_seed": 0})
    assert "this shard is missing" in refusal(written, seeded)


def test_shard_that_the_index_does_not_name_is_refused(written: Path) -> None:
    save_file({"x": torch.zeros(1)}, written / "extra.safetensors")
    assert f"{written / 'extra.safetensors'}: unexpected shard" in refusal(written)


def test_memory_indexers_file_is_no_shard(written: Path) -> None:
    save_file({"x": torch.zeros(1)}, written / "memory_indexer.safetensors")
    assert "norm.weight" in Checkpoint.open(written, SPEC).tensors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("norm.weight"), "norm.weight"),
        (lambda index: index.update({"norm.weight": FIRST}), f"{FIRST}: norm.weight is missing"),
        (lambda index: index.update({"more.weight": LAST}), f"{LAST}: more.weight is missing"),
        (
            lambda index: index.update({"norm.weight": "../x.safetensors"}),
            "norm.weight is said to be in '../x",
        ),
        (lambda index: index.update({"norm.weight": 3}), "norm.weight is said to be in 3"),
        (lambda index: index.clear(), "weight_map"),
    ],
)
def test_index_and_shards_must_agree(
    written: Path, change: Callable[[dict[str, str]], object], says: str
) -> None:
    edit_index(written, change)
    assert says in refusal(written)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "[" * 100_000])
def test_index_that_is_no_index_is_named(written: Path, text: str) -> None:
    (written / INDEX_FILE).write_text(text)
    assert INDEX_FILE in refusal(written)


def test_truncated_shard_names_the_tensor_it_ends_in(written: Path) -> None:
    path = written / LAST
    last = read_header(path)[-1]
    with path.open("r+b") as file:
        file.truncate(last.offset + last.stored.num_bytes - 5)
    assert refusal(written) == f"{path}: truncated in {last.name}: 5 bytes of it are missing"


def test_shard_truncated_after_it_was_checked_is_named(written: Path) -> None:
    checkpoint = Checkpoint.open(written, SPEC)
    last = checkpoint.tensors["norm.weight"]
    with last.path.open("r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(ModelFormatError, match=r"00002\.safetensors: truncated in norm\.weight"):
        CheckpointReader(checkpoint, SPEC).read("norm.weight")


def test_longer_shard_is_refused(written: Path) -> None:
    with (written / LAST).open("ab") as file:
        file.write(b"more")
    assert "4 bytes follow the last tensor" in refusal(written)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ('{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', "a has unknown dtype 'F4'"),
        ('{"a":{"dtype":"I8","shape":[-2],"data_offsets":[0,2]}}', r"a has shape \[-2\]"),
        ('{"a":{"dtype":"I8","shape":[true],"data_offsets":[0,1]}}', r"a has shape \[True\]"),
        ('{"a":{"dtype":"I8","shape":[2],"data_offsets":[2]}}', "a has data_offsets"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a: F32 .* takes 8 bytes"),
        ('{"a":{"dtype":"I8","shape":[2],"data_offsets":[1,3]}}', "a: its data doesn't follow"),
        (
            '{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"I8","shape":[1],"data_offsets":[1,2]}}',
            "b: its data doesn't follow",
        ),
        (
            '{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
            "a is named twice",
        ),
        ('{"a":3}', "a: the header's entry"),
        ("[]", "not a JSON object"),
        ("not JSON", "not safetensors'"),
    ],
)
def test_inconsistent_header_is_named(tmp_path: Path, header: str, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0\0")
    with pytest.raises(ModelFormatError, match=rf"x\.safetensors: .*{says}"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\1\0\0", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2**63)])
def test_file_without_a_whole_header_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"x\.safetensors: truncated"):
        read_header(path)


def test_parts_that_do_not_exist_are_refused(written: Path) -> None:
    reader = CheckpointReader(Checkpoint.open(written, SPEC), SPEC)
    for rows in (slice(0, 65), slice(3, 3), slice(0, 4, 2)):
        with pytest.raises(ValueError, match="rows"):
            reader.read(f"{FP8}.weight", rows=rows)
    with pytest.raises(ValueError, match="cut through a scale"):
        reader.read(f"{FP4}.weight", columns=slice(2, 34))
    with pytest.raises(ValueError, match="out is"):
        reader.read_into(torch.empty(3, 3), f"{FP8}.weight")


def test_files_are_as_safetensors_reads_them(written: Path, stored: dict[str, Tensor]) -> None:
    """The writer's own bytes: what we test with is the format, not our idea of it."""
    again = load_file(written / FIRST) | load_file(written / LAST)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in again)
