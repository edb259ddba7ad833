"""Token ids of a model folder's tokenizer.json: text in, bytes out, control tokens only by name.

Users' text is encoded by a tokenizer that was built without the added tokens, so nothing a user writes
can become a control token. Byte-level BPE files only: DeepSeek-V4's own, and the bundled one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers

from forepage.errors import IntegrityError, ModelFormatError
from forepage.text.control_tokens import REQUIRED, ControlToken

TOKENIZER_FILE = "tokenizer.json"


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
            vocab, added = raw["model"]["vocab"], raw["added_tokens"]
            if raw["model"]["type"] != "BPE" or (raw["decoder"] or {}).get("type") != "ByteLevel":
                raise ModelFormatError(f"{path}: not a byte-level BPE tokenizer")
            text = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFormatError(f"{path}: {type(error).__name__}: {error}") from error
        id_by_name = {item["content"]: item["id"] for item in added}
        missing = [name for name in REQUIRED if name not in id_by_name]
        if missing:
            raise ModelFormatError(f"{path}: no token named {', '.join(missing)}")
        name_by_id = {token_id: name for name, token_id in id_by_name.items()}
        return cls(text, _bytes_table(vocab, added), id_by_name, name_by_id, max(map(len, vocab)))

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


def _bytes_table(vocab: Mapping[str, int], added: Iterable[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """Id -> bytes. Added tokens that the file flags special are silent, the others spell their name."""
    spelled = {item["id"]: b"" if item["special"] else item["content"].encode() for item in added}
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
