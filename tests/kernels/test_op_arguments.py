"""Every op refuses wrong dtypes, shapes and strides by name, and needs no Triton on a CPU."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.compress_quantize import compress_quantize
from forepage_kernels.errors import ShapeError
from forepage_kernels.gather_blocks import gather_blocks
from forepage_kernels.gather_rows import gather_rows
from forepage_kernels.layout import KeyLayout, KeyPool, RowLayout, RowPool
from forepage_kernels.memory_indexer import memory_indexer
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.prefill_attention import prefill_attention
from forepage_kernels.prefill_indexer import prefill_indexer
from forepage_kernels.select_topk import select_topk
from forepage_kernels.sparse_decode import sparse_decode
from forepage_kernels.unpack_rows import unpack_rows

ROWS = RowLayout(2, 64, 64, "fp8")
KEYS = KeyLayout(2, 64, "fp8")


def row_pool() -> RowPool:
    """Two blocks of zeros."""
    return RowPool(torch.zeros(2, 400, dtype=torch.uint8), 0, ROWS)


def key_pool() -> KeyPool:
    """Two blocks of zeros."""
    return KeyPool(torch.zeros(2, 136, dtype=torch.uint8), 0, KEYS)


@dataclass(frozen=True)
class Op:
    """An op with everything but its tensors bound, and tensors it takes."""

    id: str
    call: Callable[..., object]
    tensors: Mapping[str, Tensor]


def i64(*sizes: int) -> Tensor:
    """Valid ids: zeros and ones."""
    return torch.arange(sizes[-1]).remainder(2).expand(sizes).contiguous()


def call_compress(**tensors: Tensor) -> None:
    """compress_quantize into a row pool."""
    compress_quantize(**tensors, pool=row_pool(), rope_dims=4, eps=1e-6)


def call_sparse(**tensors: Tensor) -> Tensor:
    """sparse_decode over two row pools."""
    return sparse_decode(**tensors, compressed=row_pool(), window=row_pool(), softmax_scale=1.0)


OPS = [
    Op(
        "gather_blocks",
        gather_blocks,
        {
            "pool": torch.zeros(2, 16, dtype=torch.uint8),
            "arena": torch.zeros(64, dtype=torch.uint8),
            "block_ids": i64(2),
            "arena_offsets": i64(2) * 8,
        },
    ),
    Op(
        "gather_rows",
        partial(gather_rows, row_pool()),
        {
            "arena": torch.zeros(800, dtype=torch.uint8),
            "slots": i64(2),
            "plane_offsets": i64(2) * 8,
            "entries": i64(2),
        },
    ),
    Op(
        "memory_indexer",
        partial(memory_indexer, layout=KEYS, threshold=0.5),
        {
            "queries": torch.zeros(2, 2, 3, 64),
            "weights": torch.zeros(2, 2, 3),
            "keys": torch.zeros(600, dtype=torch.uint8),
            "plane_offsets": i64(2, 3, 2) * 8,
        },
    ),
    Op(
        "native_indexer",
        partial(native_indexer, pool=key_pool()),
        {
            "q": torch.zeros(2, 3, 64),
            "weights": torch.zeros(2, 3),
            "block_table": i64(2, 3).to(torch.int32),
            "visible": i64(2),
        },
    ),
    Op("select_topk", partial(select_topk, k=2), {"logits": torch.zeros(2, 5)}),
    Op(
        "sparse_decode",
        call_sparse,
        {
            "q": torch.zeros(2, 3, 128),
            "compressed_slots": i64(2, 3),
            "window_slots": i64(2, 2),
            "sinks": torch.zeros(3),
        },
    ),
    Op(
        "compress_quantize",
        call_compress,
        {
            "kv": torch.zeros(2, 3, 128),
            "gate": torch.zeros(2, 3, 128),
            "norm_weight": torch.ones(128),
            "cos": torch.ones(2, 2),
            "sin": torch.zeros(2, 2),
            "slots": i64(2),
        },
    ),
    Op(
        "prefill_indexer",
        partial(prefill_indexer, start=4, ratio=4),
        {"q": torch.zeros(2, 3, 64), "weights": torch.zeros(2, 3), "keys": torch.zeros(1, 64)},
    ),
    Op(
        "prefill_attention",
        partial(prefill_attention, start=4, ratio=4, window_tokens=3, softmax_scale=1.0),
        {
            "q": torch.zeros(2, 3, 64),
            "rows": torch.zeros(1, 64),
            "selected": i64(2, 1),
            "window": torch.zeros(4, 64),
            "sinks": torch.zeros(3),
        },
    ),
    Op("unpack_rows", partial(unpack_rows, row_pool(), dtype=torch.float32), {"slots": i64(2)}),
]
EACH_TENSOR = [pytest.param(op, name, id=f"{op.id}-{name}") for op in OPS for name in op.tensors]


def fresh(op: Op) -> dict[str, Tensor]:
    """The op's tensors, copied."""
    return {name: tensor.clone() for name, tensor in op.tensors.items()}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.id)
def test_op_takes_its_own_example(op: Op) -> None:
    op.call(**fresh(op))


@pytest.mark.parametrize(("op", "name"), EACH_TENSOR)
def test_op_refuses_a_non_contiguous_tensor(op: Op, name: str) -> None:
    tensors = fresh(op)
    tensors[name] = torch.stack((tensors[name], tensors[name]), dim=-1)[..., 0]
    with pytest.raises(ShapeError, match=f"^{name}: must be contiguous"):
        op.call(**tensors)


@pytest.mark.parametrize(("op", "name"), EACH_TENSOR)
def test_op_refuses_a_wrong_dtype(op: Op, name: str) -> None:
    tensors = fresh(op)
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(ShapeError, match=f"^{name}: dtype"):
        op.call(**tensors)


@pytest.mark.parametrize(("op", "name"), EACH_TENSOR)
def test_op_refuses_a_wrong_rank(op: Op, name: str) -> None:
    tensors = fresh(op)
    tensors[name] = tensors[name].unsqueeze(0)
    with pytest.raises(ShapeError, match=f"^{name}: shape"):
        op.call(**tensors)


SIZED = [
    pytest.param(op, name, id=f"{op.id}-{name}")
    for op in OPS
    for name in op.tensors
    if name not in ("arena", "keys", "pool", "logits", "rows") and op.id != "unpack_rows"
]


@pytest.mark.parametrize(("op", "name"), SIZED)
def test_op_refuses_sizes_that_disagree(op: Op, name: str) -> None:
    tensors = fresh(op)
    tensors[name] = torch.cat((tensors[name], tensors[name]))
    with pytest.raises(ShapeError):
        op.call(**tensors)


def test_gather_blocks_refuses_blocks_that_are_no_whole_lanes() -> None:
    tensors = fresh(OPS[0]) | {"pool": torch.zeros(2, 12, dtype=torch.uint8)}
    with pytest.raises(ShapeError, match="block_bytes"):
        gather_blocks(**tensors)


def test_select_topk_refuses_k_below_one() -> None:
    with pytest.raises(ShapeError, match=r"^k:"):
        select_topk(torch.zeros(1, 4), 0)


def test_sparse_decode_refuses_rows_without_a_pool_and_pools_of_two_kinds() -> None:
    tensors = fresh(OPS[5])
    with pytest.raises(ShapeError, match="compressed_slots"):
        sparse_decode(**tensors, compressed=None, window=row_pool(), softmax_scale=1.0)
    other = RowPool(torch.zeros(2, 400, dtype=torch.uint8), 0, RowLayout(2, 96, 32, "fp8"))
    with pytest.raises(ShapeError, match=r"^compressed"):
        sparse_decode(**tensors, compressed=other, window=row_pool(), softmax_scale=1.0)


@pytest.mark.parametrize("rope_dims", [-2, 3, 130])
def test_compress_quantize_refuses_impossible_rope_dims(rope_dims: int) -> None:
    with pytest.raises(ShapeError, match=r"^rope_dims"):
        compress_quantize(**fresh(OPS[6]), pool=row_pool(), rope_dims=rope_dims, eps=1e-6)


def test_ops_run_on_a_cpu_without_triton() -> None:
    ops = ", ".join(f"forepage_kernels.{op.id}" for op in OPS)
    script = f"""
import sys
sys.modules["triton"] = None
import torch, {ops}
from forepage_kernels.select_topk import select_topk
assert select_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
