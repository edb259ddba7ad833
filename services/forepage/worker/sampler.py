"""Picks the next token. Randomness is a function of (seed, position), so a replay gives the same text."""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one sequence samples; temperature 0 is greedy, top_p 1, top_k 0 and min_p 0 are off."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int


def sample(logits: Tensor, sampling: Seq[Sampling], positions: Seq[int]) -> list[int]:
    """Next token of each row. Shapes: logits f32 [B, V]; positions are those the new tokens will have."""
    picked = logits.argmax(dim=-1)  # [B]
    random_rows = [row for row, how in enumerate(sampling) if how.temperature > 0]
    if random_rows:
        chosen = [sampling[row] for row in random_rows]
        draws = [uniform(sampling[row].seed, positions[row]) for row in random_rows]
        index = torch.tensor(random_rows, device=logits.device)
        picked[index] = _draw(logits[index], chosen, draws)
    return [int(token) for token in picked.tolist()]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position)."""
    packed = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draw(logits: Tensor, sampling: Seq[Sampling], draws: Seq[float]) -> Tensor:
    """Inverse of the cumulative distribution over tokens by falling probability. [R, V] -> [R]."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([how.temperature for how in sampling])
    probs, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # [R, V]
    rank = torch.arange(probs.shape[-1], device=logits.device)[None, :]
    vocab = probs.shape[-1]
    keep = rank < column([float(how.top_k or vocab) for how in sampling])
    keep &= (probs.cumsum(-1) - probs) < column([how.top_p for how in sampling])
    keep &= probs >= column([how.min_p for how in sampling]) * probs[:, :1]
    keep[:, 0] = True
    kept = probs * keep
    cumulative = kept.cumsum(-1)  # [R, V]
    target = column(list(draws)) * cumulative[:, -1:]
    index = (cumulative <= target).sum(-1, keepdim=True)  # first column above the target
    last = keep.sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(index, last)).squeeze(-1)
