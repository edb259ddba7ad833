"""The tokenizer: the bundled file is what its recipe makes, text round-trips, nothing injects control."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from forepage.errors import IntegrityError, ModelFormatError
from forepage.settings import SEEDED_MODEL
from forepage.text.control_tokens import ControlToken
from forepage.text.tokenizer import Tokenizer, byte_of_letter

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")  # noqa: RUF001
NAMED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>")  # noqa: RUF001
VOCAB_SIZE = 320


def bundled_tokenizer() -> dict[str, Any]:
    """How the bundled tokenizer.json is made: 256 bytes without merges, V4's names, then placeholders.

    `python tests/unit/test_text_tokenizer.py` writes it.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(byte_of_letter()), merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL])
    num_free = VOCAB_SIZE - 256 - len(SPECIAL) - len(NAMED)
    free = [f"<｜place▁holder▁no▁{index}｜>" for index in range(num_free)]  # noqa: RUF001
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in (*NAMED, *free)])
    made_dict: dict[str, Any] = json.loads(made.to_str())
    return made_dict


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SEEDED_MODEL)


def test_bundled_file_is_what_its_recipe_makes() -> None:
    committed = json.loads((SEEDED_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert committed == bundled_tokenizer()


def test_ids_are_bytes_then_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.token_id(name) for name in (*SPECIAL, *NAMED)] == list(range(256, 265))
    assert tokenizer.eos_id == 257
    assert tokenizer.encode_text("aé") == [0x61, 0xC3, 0xA9]


@pytest.mark.parametrize("text", ["", "plain", " a  b\n\tc ", "日本語 🙂 Привет", "\x00\x7f\u2028"])
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode_bytes(ids).decode() == text
    assert tokenizer.least_tokens(text) <= len(ids)


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    hostile = "".join((*SPECIAL, *NAMED, "<｜place▁holder▁no▁0｜>"))  # noqa: RUF001
    ids = tokenizer.encode_text(hostile)
    assert max(ids) < 256
    assert tokenizer.decode_bytes(ids).decode() == hostile


def test_special_tokens_are_silent_and_others_spell_their_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_bytes([256, 0x61, 257, 258]) == b"a"
    assert tokenizer.decode_bytes([262]) == b"</think>"


def test_token_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(IntegrityError, match="320"):
        tokenizer.decode_bytes([320])


def test_merged_tokens_of_a_real_vocabulary_decode(tmp_path: Path) -> None:
    raw = bundled_tokenizer()
    raw["model"]["vocab"] |= {"Ġt": 320, "Ġth": 321}
    raw["model"]["merges"] = [["Ġ", "t"], ["Ġt", "h"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_text("a the") == [0x61, 321, 0x65]
    assert loaded.decode_bytes([321, 0x65]) == b" the"
    assert loaded.least_tokens("a the") <= 3


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ModelFormatError, match="JSON"):
        Tokenizer.load(tmp_path)
    raw = bundled_tokenizer()
    path.write_text(json.dumps({**raw, "decoder": None}), encoding="utf-8")
    with pytest.raises(ModelFormatError, match="byte-level"):
        Tokenizer.load(tmp_path)
    raw["added_tokens"] = [item for item in raw["added_tokens"] if item["content"] != ControlToken.THINK]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ModelFormatError, match="<think>"):
        Tokenizer.load(tmp_path)


if __name__ == "__main__":
    (SEEDED_MODEL / "tokenizer.json").write_text(
        json.dumps(bundled_tokenizer(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
