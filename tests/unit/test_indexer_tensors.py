"""The memory indexer's files: the released .pt, what it is converted to, and files that are refused."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat
from forepage.model.indexer_tensors import read_tensors, target_layers, tensor_names, write_tensors
from forepage.model.memory_indexer import (
    RELEASED_THRESHOLD,
    IndexerConfig,
    MemoryIndexer,
    read_indexer_config,
    seeded_tensors,
)
from forepage.model.spec import ModelSpec, read_config
from forepage.settings import SEEDED_MODEL

CPU = torch.device("cpu")
BUNDLED = read_config(SEEDED_MODEL)
FLASH = ModelSpec.from_config(
    {**BUNDLED, "num_hidden_layers": 43, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0]}
)
"""Flash's order of layers, and the bundled model's sizes."""
RELEASED_LAYERS = (10, 12, 20)
CONFIG = IndexerConfig(RELEASED_LAYERS, 0.5, heads=8, rank=64, seed=1)
TENSORS = seeded_tensors(FLASH, CONFIG)
ROPE_TABLES = {
    f"retrievers.l{layer}.freqs_cis": torch.zeros(64, 32, dtype=torch.complex64) for layer in RELEASED_LAYERS
}
KEY = "retrievers.l12.wq_a.weight"


class Call:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A file as the release's training writes it."""
    path = tmp_path / "joint.pt"
    torch.save({**TENSORS, **ROPE_TABLES}, path)
    return path


def saved(folder: Path, state: object) -> Path:
    path = folder / "joint.pt"
    torch.save(state, path)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_released_file_is_read_without_its_rope_tables(released: Path) -> None:
    assert same(read_tensors(released, CPU), TENSORS)
    assert tensor_names(released) == list(TENSORS)


def test_format_of_older_torch_is_read_too(tmp_path: Path) -> None:
    torch.save({**TENSORS, **ROPE_TABLES}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "old.pth", CPU), TENSORS)


def test_what_was_read_is_not_the_file(released: Path) -> None:
    tensors = read_tensors(released, CPU)
    size = released.stat().st_size
    with released.open("r+b") as file:
        file.write(bytes(size))
    assert same(tensors, TENSORS)


def test_written_tensors_are_read_back(tmp_path: Path, released: Path) -> None:
    path = tmp_path / "memory_indexer.safetensors"
    write_tensors(path, read_tensors(released, CPU))
    assert same(load_file(path), TENSORS)
    assert same(read_tensors(path, CPU), TENSORS)
    assert sorted(tensor_names(path)) == sorted(TENSORS)


def test_narrow_and_strided_tensors_become_plain_fp32(tmp_path: Path) -> None:
    wide = TENSORS[KEY]
    for stored in (wide.bfloat16(), torch.nn.Parameter(wide), wide.T.contiguous().T):
        tensors = read_tensors(saved(tmp_path, {KEY: stored}), CPU)
        assert tensors[KEY].is_contiguous()
        assert not tensors[KEY].requires_grad
        assert torch.equal(tensors[KEY], stored.detach().float())


def test_released_layers_are_those_of_the_published_model(released: Path) -> None:
    config = read_indexer_config(SEEDED_MODEL, FLASH, released)
    assert config == IndexerConfig(RELEASED_LAYERS, RELEASED_THRESHOLD, heads=None, rank=None, seed=None)
    assert [FLASH.c4_layers[idx] for idx in config.target_layers] == [22, 26, 42]


@pytest.mark.parametrize("name", ["joint.pt", "joint.safetensors"])
def test_named_file_gives_the_queries_of_its_tensors(tmp_path: Path, released: Path, name: str) -> None:
    file = tmp_path / name
    if file != released:
        write_tensors(file, TENSORS)
    loaded = MemoryIndexer.load(SEEDED_MODEL, FLASH, KvFormat.FP8, CPU, file)
    direct = MemoryIndexer(FLASH, CONFIG, read_tensors(released, CPU), kv_format=KvFormat.FP8)
    assert (loaded.target_layers, loaded.heads, loaded.threshold) == (RELEASED_LAYERS, 8, RELEASED_THRESHOLD)
    hidden = torch.randn(3, FLASH.hidden_size, generator=torch.Generator().manual_seed(2))
    for found, expected in zip(loaded.queries(hidden, 300_000), direct.queries(hidden, 300_000), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_config_beside_a_named_file_counts(tmp_path: Path, released: Path) -> None:
    config = tmp_path / "memory_indexer.json"
    config.write_text('{"target_layers": [10, 12, 20], "threshold": 0.25}')
    assert MemoryIndexer.load(SEEDED_MODEL, FLASH, KvFormat.FP8, CPU, released).threshold == 0.25
    config.write_text('{"target_layers": [10, 12], "threshold": 0.25}')
    with pytest.raises(ModelFormatError, match=r"unexpected tensor retrievers\.l20\."):
        MemoryIndexer.load(SEEDED_MODEL, FLASH, KvFormat.FP8, CPU, released)


def test_named_file_that_is_absent_is_no_seeded_indexer(tmp_path: Path) -> None:
    (tmp_path / "memory_indexer.json").write_text((SEEDED_MODEL / "memory_indexer.json").read_text())
    spec = ModelSpec.from_config(BUNDLED)
    for name in ("joint.pt", "joint.safetensors"):
        with pytest.raises(ModelFormatError, match=f"{name}: can't read"):
            MemoryIndexer.load(SEEDED_MODEL, spec, KvFormat.FP8, CPU, tmp_path / name)


def test_model_without_those_layers_is_refused(released: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"c4 indices 0\.\.2, ascending, got \[10, 12, 20\]"):
        MemoryIndexer.load(SEEDED_MODEL, ModelSpec.from_config(BUNDLED), KvFormat.FP8, CPU, released)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "joint.pt"
    torch.save({**TENSORS, KEY: Call(mark)}, path, _use_new_zipfile_serialization=is_zip)
    for read in (lambda: read_tensors(path, CPU), lambda: tensor_names(path)):
        with pytest.raises(ModelFormatError, match=r"joint\.pt: refused: it holds a call of \S+, and is not"):
            read()
    assert not mark.exists()


def test_bare_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "joint.pt"
    path.write_bytes(pickle.dumps(Call(mark), protocol=2))
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the file would do it"
    mark.unlink()
    with pytest.raises(ModelFormatError, match=r"joint\.pt: "):
        read_tensors(path, CPU)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ([torch.zeros(1)], "holds a list, wanted a dict of tensors"),
        ({3: torch.zeros(1)}, "key 3 is not a tensor's name"),
        ({KEY: "text"}, r"retrievers\.l12\.wq_a\.weight is no plain tensor: str"),
        ({KEY: {"nested": torch.zeros(1)}}, r"retrievers\.l12\.wq_a\.weight is no plain tensor: dict"),
        ({KEY: torch.eye(2).to_sparse()}, r"wq_a\.weight is no plain tensor: torch\.sparse_coo tensor"),
        ({KEY: torch.zeros(2, dtype=torch.int64)}, r"retrievers\.l12\.wq_a\.weight is torch\.int64"),
        ({KEY: torch.zeros(2, dtype=torch.complex64)}, r"retrievers\.l12\.wq_a\.weight is torch\.complex64"),
    ],
    ids=["list", "number as key", "text", "nested", "sparse", "integers", "complex"],
)
def test_what_is_no_plain_tensor_is_named(tmp_path: Path, state: object, says: str) -> None:
    path = saved(tmp_path, state)
    with pytest.raises(ModelFormatError, match=rf"joint\.pt: .*{says}"):
        read_tensors(path, CPU)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00junk", b"PK\x03\x04" + bytes(40), bytes(1000)])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "joint.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"joint\.pt: "):
        read_tensors(path, CPU)


def test_truncated_file_is_named(released: Path) -> None:
    content = released.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        released.write_bytes(content[:size])
        with pytest.raises(ModelFormatError, match=r"joint\.pt: can't read"):
            read_tensors(released, CPU)


@pytest.mark.parametrize(
    "name", ["wq_a.weight", "retrievers.l.x", "retrievers.l01.x", "retrievers.m1.x", "module.retrievers.l1.x"]
)
def test_layers_come_from_indexers_tensors_only(name: str) -> None:
    with pytest.raises(ModelFormatError, match=f"f.pt: unexpected tensor {name}"):
        target_layers(Path("f.pt"), ["retrievers.l2.wq_a.weight", name])
    with pytest.raises(ModelFormatError, match="no tensor retrievers"):
        target_layers(Path("f.pt"), [])


def test_command_converts_a_released_file(tmp_path: Path, released: Path) -> None:
    target = tmp_path / "memory_indexer.safetensors"
    result = CliRunner().invoke(cli.app, ["convert-indexer", str(released), str(target)])
    assert result.exit_code == 0
    assert result.output.strip() == f"{target}: 12 tensors for c4 layers 10, 12, 20"
    assert same(load_file(target), TENSORS)


def test_command_refuses_in_one_line(tmp_path: Path, released: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save({KEY: 1}, other)
    for source, target, says in (
        (other, tmp_path / "x.safetensors", "is no plain tensor: int"),
        (released, tmp_path / "absent" / "x.safetensors", "can't write"),
    ):
        result = CliRunner().invoke(cli.app, ["convert-indexer", str(source), str(target)])
        assert result.exit_code == 1
        [line] = result.output.splitlines()
        assert line.startswith("forepage convert-indexer: ")
        assert says in line
