"""Any part of any tensor is that part of the whole; no damage to a file passes unseen as another tensor."""

import json
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.checkpoint import Checkpoint
from forepage.model.checkpoint_reader import CheckpointReader
from forepage.model.safetensors_header import read_header
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import Form
from forepage.model.weight_table import weight_table
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity_configs import MIXED

CONFIG: dict[str, object] = {
    **MIXED,
    "hidden_size": 160,
    "num_hidden_layers": 1,
    "compress_ratios": [4, 0],
    "n_routed_experts": 2,
    "moe_intermediate_size": 288,
    "quantization_config": {"quant_method": "fp8"},
}
SPEC = ModelSpec.from_config(CONFIG)
NAMES = {
    "fp8": "layers.0.attn.wo_b.weight",
    "fp8 wide": "layers.0.ffn.shared_experts.w2.weight",
    "fp4": "layers.0.ffn.experts.1.w2.weight",
    "bf16": "embed.weight",
    "fp32": "layers.0.hc_attn_fn",
    "ids": "layers.0.ffn.gate.tid2eid",
    "vector": "norm.weight",
}


class Written:
    """One checkpoint for all examples, and its whole tensors."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        write_checkpoint(folder, CONFIG, stored_tensors(CONFIG), num_shards=2)
        self.reader = CheckpointReader(Checkpoint.open(folder, SPEC), SPEC)
        self.whole: dict[str, Tensor] = {}
        for name in NAMES.values():
            ids = name.endswith("tid2eid")
            self.whole[name] = torch.empty(weight_table(SPEC)[name].shape, dtype=torch.int64 if ids else None)
            self.reader.read_into(self.whole[name], name)


WRITTEN = Written()


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, slice, slice | None]:
    """A tensor and any part of it that its form can be cut into."""
    kind = draw(st.sampled_from(sorted(NAMES)))
    shape = weight_table(SPEC)[NAMES[kind]].shape
    first = draw(st.integers(0, shape[0] - 1))
    rows = slice(first, draw(st.integers(first + 1, shape[0])))
    if len(shape) == 1:
        return NAMES[kind], rows, None
    unit = Form.FP4.scales.columns if kind == "fp4" and Form.FP4.scales else 1
    left = draw(st.integers(0, (shape[1] - 1) // unit))
    right = draw(st.integers(left + 1, math.ceil(shape[1] / unit)))
    return NAMES[kind], rows, slice(left * unit, min(right * unit, shape[1]))


@settings(max_examples=300)
@given(part=parts())
def test_a_part_is_that_part_of_the_whole(part: tuple[str, slice, slice | None]) -> None:
    name, rows, columns = part
    whole = WRITTEN.whole[name]
    wanted = whole[rows] if columns is None else whole[rows, columns]
    out = torch.empty_like(wanted)
    WRITTEN.reader.read_into(out, name, rows=rows, columns=columns)
    assert torch.equal(out, wanted)


def small_file() -> bytes:
    """A file with tensors of several dtypes and no metadata, so that every header byte means something."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(
            {
                "a.weight": torch.arange(12, dtype=torch.int8).view(3, 4),
                "a.scale": torch.ones(3, 1).to(torch.float8_e8m0fnu),
                "b": torch.arange(5, dtype=torch.float32),
                "c": torch.arange(4, dtype=torch.bfloat16),
            },
            path,
        )
        return path.read_bytes()


SMALL = small_file()
HEADER_END = 8 + int.from_bytes(SMALL[:8], "little")


def described(content: bytes) -> list[tuple[str, str, tuple[int, ...], int]] | None:
    """What the header says of the file's tensors; None when it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            return [(t.name, t.stored.dtype, t.stored.shape, t.offset) for t in read_header(path)]
        except ModelFormatError:
            return None


@given(size=st.integers(0, len(SMALL) - 1))
def test_a_file_cut_anywhere_is_refused(size: int) -> None:
    assert described(SMALL[:size]) is None


@settings(max_examples=300)
@given(at=st.integers(0, HEADER_END - 1), byte=st.integers(0, 255))
def test_a_changed_header_byte_moves_no_data(at: int, byte: int) -> None:
    """It is refused, or names, dtypes of one size or shapes of one product differ: the table sees those."""
    changed = described(SMALL[:at] + bytes([byte]) + SMALL[at + 1 :])
    sound = described(SMALL)
    assert sound is not None
    if changed is not None:
        assert [offset for *_, offset in changed] == [offset for *_, offset in sound]


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_json_header_is_refused_or_understood(header: object) -> None:
    text = json.dumps(header).encode()
    described(len(text).to_bytes(8, "little") + text)
