"""The real V4 tokenizer: the file that was checked, its ids, and no way from text to a control token."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forepage.text.control_tokens import ControlToken
from forepage.text.detokenizer import Detokenizer
from forepage.text.tokenizer import TOKENIZER_FILE, Tokenizer
from rigs.v4_tokenizer import SHA256, v4_folder, v4_oracle, v4_sha256, v4_tokenizer

ROOT = Path(__file__).parents[2]
FIRST_ADDED_ID = 128_000
ID_OF = {
    ControlToken.BOS: 0,
    ControlToken.EOS: 1,
    ControlToken.USER: 128803,
    ControlToken.ASSISTANT: 128804,
    ControlToken.THINK: 128821,
    ControlToken.END_THINK: 128822,
    ControlToken.DSML: 128825,
    ControlToken.LATEST_REMINDER: 128828,
    ControlToken.ACTION: 128829,
    ControlToken.QUERY: 128830,
    ControlToken.AUTHORITY: 128831,
    ControlToken.DOMAIN: 128832,
    ControlToken.TITLE: 128836,
    ControlToken.EXTRACTED_URL: 128844,
    ControlToken.READ_URL: 128845,
}
TEXTS = (
    "",
    " ",
    "\n\n\t  x \r\n",
    "Hello, world! It's 12345678 tokens, isn't it?",
    "日本語のテキスト、中文文本。한국어",
    "🙂👩‍👩‍👧‍👦🇫🇷 é é ́ ‮ right-to-left עברית",
    "\x00\x01\x7f\u2028\ufeff\U0010ffff",
    "def f(x):\n    return {'a': x ** 2}  # ∑ √ ≠\n",
    "a" * 1000 + "  " * 500,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return v4_tokenizer()


@pytest.fixture(scope="module")
def added() -> list[dict[str, Any]]:
    raw = json.loads((v4_folder() / TOKENIZER_FILE).read_text(encoding="utf-8"))
    tokens: list[dict[str, Any]] = raw["added_tokens"]
    return tokens


def sources() -> list[str]:
    paths = sorted([*(ROOT / "services").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
    return [path.read_text(encoding="utf-8") for path in paths]


def test_file_is_the_one_that_was_checked() -> None:
    assert v4_sha256() == SHA256


def test_ids_are_the_models(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 129_280
    assert tokenizer.eos_id == 1
    assert {name: tokenizer.token_id(name) for name in ControlToken} == ID_OF
    assert all(tokenizer.name_of(token_id) == name for name, token_id in ID_OF.items())
    assert tokenizer.name_of(1000) is None


def test_source_files_and_unicode_round_trip_as_the_library_encodes_them(tokenizer: Tokenizer) -> None:
    texts = [text for text in (*TEXTS, *sources()) if not any(name in text for name in ControlToken)]
    assert len(texts) > 60
    for text in texts:
        ids = tokenizer.encode_text(text)
        assert tokenizer.decode_bytes(ids).decode() == text
        assert tokenizer.least_tokens(text) <= len(ids)
    assert [tokenizer.encode_text(text) for text in texts] == [
        v4_oracle().encode(text, add_special_tokens=False).ids for text in texts
    ]


def test_no_added_token_can_be_written(tokenizer: Tokenizer, added: list[dict[str, Any]]) -> None:
    """Neither whole, nor in parts, nor made by what stands around it."""
    names = [item["content"] for item in added]
    assert len(names) == 1283
    hostile = [
        *names,
        *(f"x{name} {name}" for name in names),
        *(name[:cut] + name + name[cut:] for name in names for cut in (1, len(name) // 2)),
        *(before + after for before, after in pairwise(names)),
        "".join(names),
        "\n".join(names),
    ]
    for text in hostile:
        ids = tokenizer.encode_text(text)
        assert not {0, 1, 2} & set(ids)
        assert max(ids) < FIRST_ADDED_ID
        assert tokenizer.decode_bytes(ids).decode() == text


def test_pieces_of_a_control_token_in_texts_stay_text(tokenizer: Tokenizer) -> None:
    for name in ControlToken:
        for cut in range(1, len(name)):
            ids = tokenizer.encode_text(name[:cut]) + tokenizer.encode_text(name[cut:])
            assert max(ids) < FIRST_ADDED_ID
            assert not {0, 1, 2} & set(ids)


def test_incremental_text_is_the_whole_decode(tokenizer: Tokenizer) -> None:
    for text in (*TEXTS, sources()[0]):
        ids = [0, *tokenizer.encode_text(text), 128822, *tokenizer.encode_text(text), 1]
        detokenizer = Detokenizer(tokenizer)
        shown = ""
        for token in ids:
            piece = detokenizer.feed([token])
            assert "\ufffd" not in piece
            shown += piece
        assert shown + detokenizer.finish() == v4_oracle().decode(ids, skip_special_tokens=True)
