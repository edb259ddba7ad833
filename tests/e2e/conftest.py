"""One running stack for the folder, with every span received, and a document of real text."""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from rigs.otlp import receiving_spans
from rigs.stack import running_stack
from rigs.traced import Traced

DOCUMENT_TOKENS = 16_400
"""The seeded model's tokenizer is byte-level: one token a byte of ASCII."""


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Started once: the processes are real, the tests differ in what they send."""
    logs: Path = tmp_path_factory.mktemp("logs")
    kept = {"FOREPAGE_TELEMETRY__SPAN_DIR": str(logs / "spans")}
    with receiving_spans() as (spans, endpoint), running_stack(logs, otlp=endpoint, settings=kept) as stack:
        yield Traced(stack, spans)
    assert stack.leftovers() == []


@pytest.fixture(scope="session")
def document() -> str:
    """Source text that every Python installation has."""
    text = inspect.getsource(argparse).encode("ascii", "ignore").decode()
    assert len(text) > DOCUMENT_TOKENS
    return text[:DOCUMENT_TOKENS]
