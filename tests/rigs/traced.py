"""A running stack together with the receiver of its spans."""

from dataclasses import dataclass

from rigs.otlp import SpanReceiver
from rigs.stack import Stack


@dataclass(frozen=True)
class Traced:
    """What the end-to-end tests share."""

    stack: Stack
    spans: SpanReceiver
