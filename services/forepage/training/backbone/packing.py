"""How documents lie in one row of tokens, and which rows each token may see.

A step always takes as many tokens, whatever the documents' length: so all stages share one compiled
network and one CUDA graph, and only the tensors here change, in place. Documents begin on multiples of 512
tokens, which keeps their entries in blocks of their own.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forepage.errors import RequestError

BLOCK = 128
"""Tokens or rows of a block of the attention kernel."""
DOCUMENT_STEP = 512
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Packing:
    """`starts` i32 [n]: where each token's document begins; `lengths`: how many tokens each document has.

    `visible(ratio)` follows every `pack`.
    """

    def __init__(
        self,
        num_tokens: int,
        ratios: Sequence[int],
        *,
        window_tokens: int,
        device: torch.device,
        in_blocks: bool | None = None,
    ) -> None:
        """`in_blocks`: masks for the attention kernel, as on a GPU, not dense ones, as on a CPU.

        Raises: RequestError for a number of tokens that can't be cut into whole blocks.
        """
        self.num_tokens = num_tokens
        self.window_tokens = window_tokens
        self.device = device
        self.starts = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self.lengths: tuple[int, ...] = (num_tokens,)
        self._in_blocks = device.type == "cuda" if in_blocks is None else in_blocks
        self.places = num_tokens // min((ratio for ratio in ratios if ratio), default=num_tokens)
        if self._in_blocks and self.places % BLOCK:
            raise RequestError(f"tokens of a step must be a multiple of {DOCUMENT_STEP}", "tokens")
        self._masks = {ratio: self._mask(ratio) for ratio in sorted(set(ratios))}

    def pack(self, lengths: Sequence[int]) -> None:
        """Documents of these lengths, one after another. Raises: RequestError unless they fill the row."""
        if sum(lengths) != self.num_tokens or any(length % DOCUMENT_STEP for length in lengths):
            raise RequestError(f"documents of {lengths} tokens don't fill {self.num_tokens}", "length")
        begins = torch.tensor([0, *accumulate(lengths[:-1])], dtype=torch.int32)
        self.starts.copy_(begins.repeat_interleave(torch.tensor(list(lengths))))
        self.lengths = tuple(lengths)
        for ratio, mask in self._masks.items():
            _overwrite(mask, self._mask(ratio))

    def visible(self, ratio: int) -> BlockMask | Tensor:
        """Which of [entry places | tokens] each token sees in layers of this ratio."""
        return self._masks[ratio]

    def narrowed(self, ratio: int, chosen: Tensor) -> BlockMask | Tensor:
        """`visible(ratio)`, but of the entries only each token's chosen ones: bool [n, P], all visible.

        A fresh mask. In blocks: one of which no token chose anything is not read at all.
        """
        seen = self._masks[ratio]
        if isinstance(seen, Tensor):
            return torch.cat((chosen, seen[:, self.places :]), dim=1)
        blocks = chosen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [q, BLOCK, k, BLOCK]
        touched, full = blocks.any(3).any(1), blocks.all(3).all(1)
        near = _near_blocks(self.starts[::BLOCK], self.num_tokens, self.window_tokens)
        return BlockMask.from_kv_blocks(
            *_ordered(torch.cat((touched & ~full, near), dim=1)),
            *_ordered(torch.cat((full, torch.zeros_like(near)), dim=1)),
            BLOCK_SIZE=BLOCK,
            mask_mod=chosen_visibility(self.starts, chosen, self.window_tokens),
            seq_lengths=(self.num_tokens, self.places + self.num_tokens),
        )

    def first_entries(self, ratio: int) -> Tensor:
        """bool [n / ratio]: the first entry of each document."""
        tokens = torch.arange(0, self.num_tokens, ratio, device=self.device)
        return self.starts[::ratio] == tokens

    def _mask(self, ratio: int) -> BlockMask | Tensor:
        rule = visibility(self.starts, ratio, self.places, self.window_tokens)
        if not self._in_blocks:
            tokens = torch.arange(self.num_tokens, device=self.device).unsqueeze(1)
            rows = torch.arange(self.places + self.num_tokens, device=self.device).unsqueeze(0)
            zero = torch.zeros((), dtype=torch.int64, device=self.device)
            return rule(zero, zero, tokens, rows)
        partial, full = _blocks(self.starts.cpu(), ratio, self.places, self.window_tokens)
        return BlockMask.from_kv_blocks(
            *_ordered(partial.to(self.device)),
            *_ordered(full.to(self.device)),
            BLOCK_SIZE=BLOCK,
            mask_mod=rule,
            seq_lengths=(self.num_tokens, self.places + self.num_tokens),
        )


def visibility(starts: Tensor, ratio: int, places: int, window_tokens: int) -> MaskRule:
    """The exact rule: closed entries of the own document, and the window's tokens of it.

    What differs between layer kinds is in tensors, so that they share one compiled kernel.
    """
    span = torch.tensor(max(ratio, 1), dtype=torch.int32, device=starts.device)
    entries = torch.tensor(len(starts) // ratio if ratio else 0, dtype=torch.int32, device=starts.device)

    def rule(_batch: Tensor, _head: Tensor, token: Tensor, row: Tensor) -> Tensor:
        start = starts[token]
        closed = (row < entries) & (row * span >= start) & ((row + 1) * span <= token + 1)
        other = row - places
        near = (row >= places) & (other >= start) & (other <= token) & (token - other < window_tokens)
        return closed | near

    return rule


def chosen_visibility(starts: Tensor, chosen: Tensor, window_tokens: int) -> MaskRule:
    """`visibility` where a token sees its chosen entries, bool [n, P], and no others."""
    places = chosen.shape[1]

    def rule(_batch: Tensor, _head: Tensor, token: Tensor, row: Tensor) -> Tensor:
        other = row - places
        near = (other >= starts[token]) & (other <= token) & (token - other < window_tokens)
        return ((row < places) & chosen[token, row.clamp(max=places - 1)]) | ((row >= places) & near)

    return rule


def _near_blocks(starts: Tensor, num_tokens: int, window_tokens: int) -> Tensor:
    """bool [n / BLOCK, n / BLOCK]; starts i32 [n / BLOCK] of each block's document."""
    tokens = torch.arange(0, num_tokens, BLOCK, device=starts.device)
    first = tokens.unsqueeze(1)
    oldest = (first - window_tokens + 1).clamp(min=0)
    return (tokens + BLOCK - 1 >= oldest) & (tokens <= first) & (tokens >= starts.unsqueeze(1))


def _blocks(starts: Tensor, ratio: int, places: int, window_tokens: int) -> tuple[Tensor, Tensor]:
    """bool [n / BLOCK, (P + n) / BLOCK] twice: seen in part, seen whole by every token of the block."""
    num_tokens = len(starts)
    first = torch.arange(0, num_tokens, BLOCK).unsqueeze(1)  # [q, 1] token
    start, last = starts[::BLOCK].unsqueeze(1), first + BLOCK - 1
    near = _near_blocks(starts[::BLOCK], num_tokens, window_tokens)
    begin = torch.arange(0, places, BLOCK).unsqueeze(0) * ratio  # token of the first entry of a block
    span = ratio * BLOCK
    full = (begin >= start) & (begin + span <= first + 1) & (ratio > 0)
    touched = (begin + span > start) & (torch.maximum(begin, start) + ratio <= last + 1) & (ratio > 0)
    return torch.cat((touched & ~full, near), dim=1), torch.cat((full, torch.zeros_like(near)), dim=1)


def _ordered(seen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [q, k] -> how many i32 [1, 1, q], and their indices first i32 [1, 1, q, k]."""
    counts = seen.sum(1, dtype=torch.int32)
    indices = seen.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None].contiguous()


def _overwrite(mask: BlockMask | Tensor, new: BlockMask | Tensor) -> None:
    """Copy a mask's tensors into those of another, which a CUDA graph may have captured."""
    if isinstance(mask, Tensor) and isinstance(new, Tensor):
        mask.copy_(new)
        return
    assert isinstance(mask, BlockMask)
    assert isinstance(new, BlockMask)
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            getattr(mask, f"{name}_{part}").copy_(getattr(new, f"{name}_{part}"))
