"""Packed documents: the masks are the rule that a reader of one document at a time would apply."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forepage.errors import RequestError
from forepage.training.backbone.packing import BLOCK, DOCUMENT_STEP, Packing

CPU = torch.device("cpu")
WINDOW = 128
RATIOS = (0, 4, 128)
STEPS = 4
"""Documents fill so many times DOCUMENT_STEP tokens."""

lengths_of_documents = st.lists(st.integers(1, STEPS), min_size=1, max_size=STEPS).map(
    lambda parts: [part * DOCUMENT_STEP for part in _filled(parts)]
)


def _filled(parts: list[int]) -> list[int]:
    """As many of the parts as fit, and what is left."""
    taken: list[int] = []
    for part in parts:
        taken.append(min(part, STEPS - sum(taken)))
    taken.append(STEPS - sum(taken))
    return [part for part in taken if part]


def packed(lengths: list[int], *, in_blocks: bool, window: int = WINDOW) -> Packing:
    packing = Packing(sum(lengths), RATIOS, window_tokens=window, device=CPU, in_blocks=in_blocks)
    packing.pack(lengths)
    return packing


def brute_force(lengths: list[int], ratio: int, window: int) -> NDArray[np.bool_]:
    """[n, n / 4 + n]: document by document, token by token, what has been closed and what is near."""
    total = sum(lengths)
    places = total // 4
    seen = np.zeros((total, places + total), bool)
    begin = 0
    for length in lengths:
        for at in range(length):
            token = begin + at
            if ratio:
                seen[token, begin // ratio : begin // ratio + (at + 1) // ratio] = True
            seen[token, places + begin + max(0, at - window + 1) : places + token + 1] = True
        begin += length
    return seen


@settings(max_examples=12, deadline=None)
@given(lengths=lengths_of_documents, window=st.sampled_from([64, 128, 200]))
def test_masks_equal_brute_force(lengths: list[int], window: int) -> None:
    packing = packed(lengths, in_blocks=False, window=window)
    for ratio in RATIOS:
        mask = packing.visible(ratio)
        assert isinstance(mask, Tensor)
        assert np.array_equal(mask.numpy(), brute_force(lengths, ratio, window))


@settings(max_examples=12, deadline=None)
@given(lengths=lengths_of_documents, window=st.sampled_from([64, 128, 200]))
def test_block_lists_and_their_rule_give_the_same_mask(lengths: list[int], window: int) -> None:
    """A partial block is masked by the rule, a full one is not; a block in neither list is never read."""
    packing = packed(lengths, in_blocks=True, window=window)
    for ratio in RATIOS:
        mask = packing.visible(ratio)
        assert isinstance(mask, BlockMask)
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (partial & full).any(), "a block in both lists would be attended twice"
        total = packing.num_tokens
        zero = torch.zeros((), dtype=torch.int64)
        rule = mask.mask_mod(
            zero,
            zero,
            torch.arange(total).unsqueeze(1),
            torch.arange(packing.places + total).unsqueeze(0),
        )
        seen = (rule & spread(partial)) | spread(full)
        assert np.array_equal(seen.numpy(), brute_force(lengths, ratio, window))


@settings(max_examples=12, deadline=None)
@given(
    lengths=lengths_of_documents,
    window=st.sampled_from([64, 128, 200]),
    share=st.sampled_from([0.0, 0.001, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def test_a_choice_of_entries_narrows_the_mask_to_it(
    lengths: list[int], window: int, share: float, seed: int
) -> None:
    """The same in both forms, and the window stays; a block that nobody chose of is in neither list."""
    expected = brute_force(lengths, 4, window)
    dense, blocked = (packed(lengths, in_blocks=each, window=window) for each in (False, True))
    places = dense.places
    drawn = np.random.default_rng(seed).random((dense.num_tokens, places)) < share
    expected[:, :places] &= drawn
    chosen = torch.from_numpy(expected[:, :places].copy())
    plain, mask = dense.narrowed(4, chosen), blocked.narrowed(4, chosen)
    assert isinstance(plain, Tensor)
    assert np.array_equal(plain.numpy(), expected)
    assert isinstance(mask, BlockMask)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any(), "a block in both lists would be attended twice"
    tokens, rows = torch.arange(dense.num_tokens), torch.arange(places + dense.num_tokens)
    zero = torch.zeros((), dtype=torch.int64)
    rule = mask.mask_mod(zero, zero, tokens.unsqueeze(1), rows.unsqueeze(0))
    assert np.array_equal(((rule & spread(partial)) | spread(full)).numpy(), expected)
    needed = torch.from_numpy(expected).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).any(3).any(1)
    entries = places // BLOCK
    assert torch.equal((partial | full)[:, :entries], needed[:, :entries])


def test_everything_chosen_gives_the_lists_of_the_dense_mask() -> None:
    packing = packed([512, 1536], in_blocks=True)
    dense = packing.visible(4)
    assert isinstance(dense, BlockMask)
    closed = torch.from_numpy(brute_force([512, 1536], 4, WINDOW)[:, : packing.places].copy())
    mask = packing.narrowed(4, closed)
    assert isinstance(mask, BlockMask)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(dense, name)), name


LONG = 32768
"""Tokens of a step in training: there c128 layers too have blocks of entries that are seen whole."""


@pytest.mark.parametrize(
    ("lengths", "whole"),
    [([LONG], True), ([16896, LONG - 16896], True), ([512, LONG - 512], False), ([512] * 64, False)],
)
def test_block_lists_of_a_real_step_are_all_and_only_what_is_seen(lengths: list[int], whole: bool) -> None:
    """A block's first and last token tell: entries close as tokens go on, and the window is a block wide."""
    packing = packed(lengths, in_blocks=True)
    rows = torch.arange(packing.places + LONG).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64)
    full_blocks = 0
    for ratio in RATIOS:
        mask = packing.visible(ratio)
        assert isinstance(mask, BlockMask)
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        begins = torch.arange(0, LONG, BLOCK).unsqueeze(1)
        first, last = (
            mask.mask_mod(zero, zero, tokens, rows).unflatten(1, (-1, BLOCK))
            for tokens in (begins, begins + BLOCK - 1)
        )
        assert torch.equal(partial | full, first.any(2) | last.any(2))
        assert torch.equal(full, first.all(2) & last.all(2) & full_may_be(ratio, packing.places))
        full_blocks += int(full[:, : packing.places // BLOCK].sum()) if ratio == 128 else 0
    assert (full_blocks > 0) == whole


def full_may_be(ratio: int, places: int) -> Tensor:
    """bool [1, k]: blocks of entries; the window's are masked token by token."""
    blocks = torch.zeros(1, (places + LONG) // BLOCK, dtype=torch.bool)
    blocks[:, : places // BLOCK] = ratio > 0
    return blocks


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Counts [1, 1, q] and indices [1, 1, q, k] of blocks -> bool [q, k]."""
    blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for query, count in enumerate(counts[0, 0].tolist()):
        blocks[query, indices[0, 0, query, :count].long()] = True
    return blocks


def spread(blocks: Tensor) -> Tensor:
    """bool [q, k] of blocks -> of tokens and rows."""
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@settings(max_examples=8, deadline=None)
@given(before=lengths_of_documents, lengths=lengths_of_documents)
def test_packing_anew_leaves_nothing_of_the_documents_before(before: list[int], lengths: list[int]) -> None:
    """In place: a captured graph holds these very tensors."""
    packing = packed(before, in_blocks=True)
    held = {ratio: packing.visible(ratio) for ratio in RATIOS}
    packing.pack(lengths)
    fresh = packed(lengths, in_blocks=True)
    for ratio, mask in held.items():
        assert packing.visible(ratio) is mask
        new = fresh.visible(ratio)
        assert isinstance(mask, BlockMask)
        assert isinstance(new, BlockMask)
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mask, name), getattr(new, name))
        assert torch.equal(mask.kv_indices, new.kv_indices)
    begins = np.cumsum([0, *lengths[:-1]])
    for ratio in (4, 128):
        assert packing.first_entries(ratio).nonzero().flatten().tolist() == (begins // ratio).tolist()


@pytest.mark.parametrize("lengths", [[512, 256], [512], [1024, 1024], [768, 256]])
def test_documents_that_do_not_fill_the_row_are_refused(lengths: list[int]) -> None:
    packing = Packing(1024, RATIOS, window_tokens=WINDOW, device=CPU)
    with pytest.raises(RequestError, match="don't fill"):
        packing.pack(lengths)


def test_tokens_that_give_no_whole_blocks_are_refused() -> None:
    with pytest.raises(RequestError, match="multiple of 512"):
        Packing(256, RATIOS, window_tokens=WINDOW, device=CPU, in_blocks=True)
