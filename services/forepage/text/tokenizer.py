"""Token ids of a model folder's tokenizer.json: text in, bytes out, control tokens only by name.

Users' text is encoded by a tokenizer that was built without the added tokens, so nothing a user writes
can become a control token. Byte-level BPE files only: DeepSeek-V4's own, and the bundled one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import tokenizers
from pydantic import BaseModel, Field, ValidationError

from forepage.errors import IntegrityError, ModelFormatError
from forepage.text.control_tokens import REQUIRED, ControlToken

TOKENIZER_FILE = "tokenizer.json"


MOST_IDS = 1 << 24
"""Far above every vocabulary: a larger id is damage, and a table up to it would be huge."""
TokenId = Annotated[int, Field(ge=0, lt=MOST_IDS, strict=True)]


class _AddedToken(BaseModel):
    id: TokenId
    content: str
    special: bool


class _Model(BaseModel):
    type: Literal["BPE"]
    vocab: Annotated[dict[str, TokenId], Field(min_length=1)]


class _Decoder(BaseModel):
    type: Literal["ByteLevel"]


class _File(BaseModel):
    """What we read of tokenizer.json ourselves."""

    model: _Model
    decoder: _Decoder
    added_tokens: list[_AddedToken]


@dataclass(frozen=True)
class Tokenizer:
    """One model's tokens. Calls are thread-safe; encoding releases the GIL."""

    _text: tokenizers.Tokenizer
    _bytes_by_id: tuple[bytes, ...]
    _id_by_name: Mapping[str, int]
    _name_by_id: Mapping[int, str]
    _longest_bytes: int

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/tokenizer.json. Raises: ModelFormatError naming what is missing or foreign."""
        path = folder / TOKENIZER_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            file = _File.model_validate(raw)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise ModelFormatError(
                f"{path}: not a byte-level BPE tokenizer ({where}: {error.errors()[0]['msg']})"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFormatError(f"{path}: {type(error).__name__}: {error}") from error
        try:
            text = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFormatError(f"{path}: {error}") from error
        vocab, added = file.model.vocab, file.added_tokens
        id_by_name = {token.content: token.id for token in added}
        missing = [name for name in REQUIRED if name not in id_by_name]
        if missing:
            raise ModelFormatError(f"{path}: no token named {', '.join(missing)}")
        name_by_id = {token_id: name for name, token_id in id_by_name.items()}
        try:
            table = _bytes_table(vocab, added)
        except KeyError as error:
            raise ModelFormatError(f"{path}: a token has the letter {error}, which is no byte") from None
        return cls(text, table, id_by_name, name_by_id, max(map(len, vocab)))

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to this, exclusive."""
        return len(self._bytes_by_id)

    @property
    def eos_id(self) -> int:
        """The token that ends an assistant's turn."""
        return self._id_by_name[ControlToken.EOS]

    def token_id(self, name: str) -> int:
        """Id of an added token. Raises: KeyError for a name that the file doesn't add."""
        return self._id_by_name[name]

    def has_token(self, name: str) -> bool:
        """Whether the file adds a token of this name."""
        return name in self._id_by_name

    def name_of(self, token_id: int) -> str | None:
        """Name of an added token; None for a token of text."""
        return self._name_by_id.get(token_id)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a user's text; never a control token, whatever the text spells."""
        return self._text.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def least_tokens(self, text: str) -> int:
        """A lower bound of len(encode_text(text)), without encoding."""
        return -(-len(text.encode()) // self._longest_bytes)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids, which may end inside a character; special tokens give nothing.

        Raises: IntegrityError for an id outside the vocabulary: another model's tokenizer.
        """
        try:
            return b"".join([self._bytes_by_id[token] for token in ids])
        except IndexError as error:
            raise IntegrityError(f"a token id is outside the vocabulary of {self.vocab_size}") from error


def _bytes_table(vocab: Mapping[str, int], added: Iterable["_AddedToken"]) -> tuple[bytes, ...]:
    """Id -> bytes. Added tokens that the file flags special are silent, the others spell their name."""
    spelled = {token.id: b"" if token.special else token.content.encode() for token in added}
    byte_of = byte_of_letter()
    for token, token_id in vocab.items():
        if token_id not in spelled:
            spelled[token_id] = bytes(byte_of[letter] for letter in token)
    return tuple(spelled.get(token_id, b"") for token_id in range(max(spelled) + 1))


def byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up.

    Source: GPT-2's byte-level BPE, the alphabet of every byte-level tokenizer.json.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
