"""Picks the next token. Randomness is a function of (seed, position), so a replay gives the same text.

Order: penalties, then the constraint's mask, then temperature, top_k, top_p, min_p. Log-probabilities are
the model's own, before any of it. Penalties as OpenAI defines presence and frequency (over generated
tokens) and as CTRL defines repetition (over prompt and generated tokens).
"""

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from forepage_kernels.draw_sorted import draw_sorted


@dataclass(frozen=True)
class Sampling:
    """How one sequence samples; temperature 0 is greedy, top_p 1, top_k 0 and min_p 0 are off."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_logprobs: int | None = None

    @property
    def has_penalty(self) -> bool:
        """Whether what was said before matters."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def is_plain(self) -> bool:
        """Whether `pick_tokens` can pick: nothing of the past and no log-probabilities."""
        return not self.has_penalty and self.num_logprobs is None


@dataclass(frozen=True)
class Row:
    """One sequence's turn: its parameters, the position the new token will have, and what was said before.

    `generated` counts generated tokens, `seen` are the distinct tokens of prompt and answer; both are
    read only with a penalty. `mask` is a little-endian bitmap of the tokens that may come, none: all.
    """

    sampling: Sampling
    position: int
    generated: Mapping[int, int] = field(default_factory=dict)
    seen: frozenset[int] | set[int] = frozenset()
    mask: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `pick_tokens` can pick for it."""
        return self.mask is None and self.sampling.is_plain


@dataclass(frozen=True)
class Pick:
    """The next token; with log-probabilities if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Draws:
    """How R rows draw, and the number in [0, 1) each draws with: f64 [R] each, on the logits' device."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    target: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> "Draws":
        """From f64 [R, 5], a row as `draw_columns` gives it."""
        return cls(*columns.unbind(1))

    def part(self, first: int, last: int) -> "Draws":
        """Rows first..last-1."""
        columns = (self.temperature, self.top_p, self.top_k, self.min_p, self.target)
        return Draws(*(column[first:last] for column in columns))


NUM_DRAW_COLUMNS = 5
DRAW_ELEMENTS = 1 << 22
"""Probabilities sorted at once: 32 MiB in f64, and half a dozen tensors of that size beside them."""


def draw_columns(row: Row, vocab_size: int) -> tuple[float, float, float, float, float]:
    """The row's place in `Draws`; a greedy row's temperature is 0."""
    how = row.sampling
    if how.temperature == 0:
        return 0.0, 1.0, 0.0, 0.0, 0.0
    top_k = float(how.top_k or vocab_size)
    return how.temperature, how.top_p, top_k, how.min_p, uniform(how.seed, row.position)


def pick_tokens(logits: Tensor, how: Draws | None) -> Tensor:
    """Plain rows, on the device: f32 [B, V] -> i64 [B]; without `how` all are greedy.

    The tokens of `sample`, bit for bit, without penalties, masks and log-probabilities.
    """
    greedy = logits.argmax(dim=-1)
    if how is None:
        return greedy
    is_random = how.temperature > 0
    temperature = torch.where(is_random, how.temperature, 1.0)
    return torch.where(is_random, draw(logits, replace(how, temperature=temperature)), greedy)


def sample(logits: Tensor, rows: Seq[Row]) -> list[Pick]:
    """Next token of each row. Shapes: logits f32 [B, V]; a row's result does not depend on the others."""
    shaped = _shaped(logits, rows)
    picked = shaped.argmax(dim=-1)  # [B]
    random_rows = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if random_rows:
        chosen = [rows[index] for index in random_rows]
        index = torch.tensor(random_rows, device=logits.device)
        columns = torch.tensor(
            [draw_columns(row, logits.shape[1]) for row in chosen], dtype=torch.float64, device=logits.device
        )
        picked[index] = draw(shaped[index], Draws.of(columns))
    tokens = [int(token) for token in picked.tolist()]
    return [
        _with_logprobs(logits[at], row.sampling, token)
        for at, (row, token) in enumerate(zip(rows, tokens, strict=True))
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position)."""
    packed = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _shaped(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """Logits after penalties and masks; the same tensor when no row has any."""
    special = [at for at, row in enumerate(rows) if row.sampling.has_penalty or row.mask is not None]
    if not special:
        return logits
    shaped = logits.clone()
    for at in special:
        row = rows[at]
        if row.sampling.has_penalty:
            _penalise(shaped[at], row)
        if row.mask is not None:
            bits = torch.frombuffer(bytearray(row.mask), dtype=torch.uint8)
            allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
            shaped[at].masked_fill_(~allowed[: logits.shape[1]].bool().to(logits.device), -torch.inf)
    return shaped


def _penalise(logits: Tensor, row: Row) -> None:
    """In place, one row: repetition over everything seen, presence and frequency over what was generated."""
    how = row.sampling
    if how.repetition_penalty != 1.0 and row.seen:
        seen = torch.tensor(sorted(row.seen), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / how.repetition_penalty, values * how.repetition_penalty
        )
    if row.generated:
        tokens = torch.tensor(list(row.generated), device=logits.device)
        counts = torch.tensor(list(row.generated.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= how.presence_penalty + how.frequency_penalty * counts


def draw(logits: Tensor, how: Draws) -> Tensor:
    """Inverse of the cumulative distribution over tokens by falling probability. [R, V] -> i64 [R].

    A row's result is the same whatever rows stand beside it, on every launch. Nothing is read back.
    """
    rows_at_once = max(1, DRAW_ELEMENTS // logits.shape[1])
    parts = [
        _draw_tile(logits[first : first + rows_at_once], how.part(first, first + rows_at_once))
        for first in range(0, logits.shape[0], rows_at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_tile(logits: Tensor, how: Draws) -> Tensor:
    scaled = logits.double() / how.temperature[:, None]
    probs, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # [R, V]
    column = draw_sorted(probs, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p, target=how.target)
    return order.gather(-1, column[:, None]).squeeze(-1)


def _with_logprobs(logits: Tensor, how: Sampling, token: int) -> Pick:
    if how.num_logprobs is None:
        return Pick(token)
    logprobs = logits.float().log_softmax(dim=-1)  # [V]
    best = logprobs.topk(min(how.num_logprobs, logprobs.numel()))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Pick(token, float(logprobs[token]), tuple((int(other), float(value)) for other, value in top))
