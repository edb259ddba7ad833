"""One text's frozen features: all that training the memory indexer ever sees of the backbone.

Rows are the tokens that come before an answer's token: the last of the question, then the answer's own.
A plan made at a row serves the steps of the next rows of the same answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.training.indexer.golden import Golden


@dataclass(frozen=True)
class TextId:
    """Where a text comes from."""

    suite: str
    length_tokens: int
    seed: int
    is_validation: bool


@dataclass(frozen=True)
class Features:
    """Of one text: T rows, L target layers, C c4 layers, M blocks of keys, N visible entries at its end."""

    text: TextId
    num_entries: int
    positions: Tensor  # i32 [T]
    answers: Tensor  # i32 [T]: which answer a row belongs to, ascending
    hidden: Tensor  # bf16 [T, L, D]: attention inputs (after attn_norm) at the target layers
    keys: Tensor  # u8 [L, M, plane bytes]: as the cold pool stores them
    golden: Golden  # of T * C rows: token by token, c4 layer by c4 layer

    @property
    def num_rows(self) -> int:
        """T."""
        return self.positions.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """By the names they are stored under."""
        return {
            "positions": self.positions,
            "answers": self.answers,
            "hidden": self.hidden,
            "keys": self.keys,
            "golden_counts": self.golden.counts,
            "golden_entries": self.golden.entries,
            "golden_masses": self.golden.masses,
        }

    def to(self, device: torch.device) -> "Features":
        """The same on a device."""
        return features_of(self.text, self.num_entries, {k: v.to(device) for k, v in self.tensors().items()})


def features_of(text: TextId, num_entries: int, tensors: dict[str, Tensor]) -> Features:
    """Features of `Features.tensors`."""
    golden = Golden(tensors["golden_counts"], tensors["golden_entries"], tensors["golden_masses"])
    return Features(
        text=text,
        num_entries=num_entries,
        positions=tensors["positions"],
        answers=tensors["answers"],
        hidden=tensors["hidden"],
        keys=tensors["keys"],
        golden=golden,
    )
