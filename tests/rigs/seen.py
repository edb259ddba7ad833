"""The type of the fixture by which a test of a fault tells what it saw."""

from collections.abc import Callable

Seen = Callable[..., None]
