"""One training text as tokens: which of them count fully in the loss, and what they belong to.

numpy only: worker processes make these, without torch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REST = 0
"""Kind of tokens that are no part of an answer."""
NO_QUESTION = -1
PAD = 258


@dataclass(frozen=True)
class Document:
    """Arrays of one length. A token is an *answer* where its kind isn't REST; pads are no target at all."""

    tokens: NDArray[np.uint16]
    kinds: NDArray[np.uint8]
    questions: NDArray[np.int32]  # the question an answer's token belongs to, else NO_QUESTION
    decisive: NDArray[np.bool_]  # tokens of an answer that only the right part of the context gives

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def padded(self, length: int) -> "Document":
        """Followed by pads. Raises: ValueError where it is longer."""
        if self.length > length:
            raise ValueError(f"a document of {self.length} tokens doesn't fit {length}")
        missing = length - self.length
        return Document(
            tokens=np.concatenate((self.tokens, np.full(missing, PAD, np.uint16))),
            kinds=np.concatenate((self.kinds, np.zeros(missing, np.uint8))),
            questions=np.concatenate((self.questions, np.full(missing, NO_QUESTION, np.int32))),
            decisive=np.concatenate((self.decisive, np.zeros(missing, np.bool_))),
        )
