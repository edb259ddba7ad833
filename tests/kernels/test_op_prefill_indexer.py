"""prefill_indexer: causal scores of many tokens, equal to those of native_indexer token by token."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from forepage_kernels.layout import KeyFormat, KeyLayout, KeyPool, load_rows, store_rows
from forepage_kernels.native_indexer import native_indexer
from forepage_kernels.prefill_indexer import kernel, prefill_indexer, reference

Check = Callable[[Tensor, Tensor], None]
NanOutputs = Callable[[], AbstractContextManager[None]]
RATIO = 4


@dataclass(frozen=True)
class Case:
    """`tokens` from `start` on over `entries` keys, of which the last ones may be closed to all."""

    id: str
    tokens: int
    start: int
    entries: int
    heads: int
    dims: int
    gpu: bool = False


CASES = [
    Case("one-token", 1, 3, 1, 1, 32),
    Case("nothing-closed", 3, 0, 5, 3, 64),
    Case("no-keys", 2, 0, 0, 4, 128),
    Case("no-tokens", 0, 12, 3, 4, 128),
    Case("odd", 7, 515, 130, 5, 64),
    Case("tiny", 9, 600, 140, 8, 128),
    Case("flash-heads", 3, 63, 16, 64, 128),
    Case("flash-64k", 256, 65_280, 16_384, 64, 128, gpu=True),
    Case("tiny-512k", 512, 523_776, 131_072, 8, 128, gpu=True),
    Case("early-chunk", 4_096, 0, 1_024, 64, 128, gpu=True),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    q: Tensor
    weights: Tensor
    keys: Tensor
    start: int

    def to(self, device: torch.device) -> "Call":
        """The same there."""
        return Call(self.q.to(device), self.weights.to(device), self.keys.to(device), self.start)


def make(case: Case, generator: torch.Generator) -> Call:
    """Scores of unit scale; keys that no token has closed are NaN."""
    rand = partial(torch.randn, generator=generator)
    keys = rand(case.entries, case.dims).bfloat16()
    keys[(case.start + case.tokens) // RATIO :] = float("nan")
    weights = rand(case.tokens, case.heads) * (case.heads * case.dims) ** -0.5
    return Call(rand(case.tokens, case.heads, case.dims), weights, keys, case.start)


def score(op: Callable[..., Tensor], call: Call) -> Tensor:
    """Call an implementation."""
    return op(call.q, call.weights, call.keys, start=call.start, ratio=RATIO)


@pytest.mark.parametrize("key_format", ["fp8", "mxfp4", "fp32"])
def test_reference_equals_decode_token_by_token(
    key_format: KeyFormat, generator: torch.Generator, assert_close: Check
) -> None:
    rand = partial(torch.randn, generator=generator)
    layout, start, tokens = KeyLayout(8, 64, key_format), 50, 23
    num_entries = (start + tokens) // RATIO
    pool = KeyPool(torch.full((3, -(-layout.plane_bytes // 8) * 8), 0xFF, dtype=torch.uint8), 0, layout)
    slots = torch.arange(num_entries)
    store_rows(pool, slots, rand(num_entries, 64))
    q, weights = rand(tokens, 5, 64), rand(tokens, 5) * 0.05
    keys = load_rows(pool, slots)
    if key_format != "fp32":
        keys = keys.bfloat16()
    visible = (torch.arange(start, start + tokens) + 1) // RATIO
    table = torch.arange(3, dtype=torch.int32).expand(tokens, -1).contiguous()
    want = native_indexer(q, weights, pool, block_table=table, visible=visible)[:, :num_entries]
    assert_close(prefill_indexer(q, weights, keys, start=start, ratio=RATIO), want)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.gpu] * case.gpu) for case in CASES]
)
def test_kernel_equals_the_reference(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Check,
    nan_outputs: NanOutputs,
) -> None:
    call = make(case, generator)
    with nan_outputs():
        got = score(prefill_indexer if device.type == "cuda" else kernel.prefill_indexer, call.to(device))
    # At real sizes the reference runs on the GPU too, in fp32.
    want = score(reference.prefill_indexer, call.to(device) if case.gpu else call)
    assert torch.equal(got.cpu().isneginf(), want.cpu().isneginf())
    assert_close(got, want)


@pytest.mark.gpu
def test_scores_do_not_depend_on_the_chunk_bit_for_bit(
    device: torch.device, generator: torch.Generator
) -> None:
    call = make(CASES[5], generator).to(device)
    together = score(kernel.prefill_indexer, call)
    for token in range(call.q.shape[0]):
        part = slice(token, token + 1)
        one = Call(call.q[part], call.weights[part], call.keys, call.start + token)
        assert torch.equal(score(kernel.prefill_indexer, one), together[part])


def test_a_key_that_is_no_number_scores_nan_on_both(device: torch.device, generator: torch.Generator) -> None:
    call = make(Case("damaged", 4, 120, 30, 5, 64), generator)
    call.keys[11] = float("nan")
    for got in (
        score(reference.prefill_indexer, call),
        score(kernel.prefill_indexer, call.to(device)).cpu(),
    ):
        assert got.isnan().any(0).nonzero().flatten().tolist() == [11]
