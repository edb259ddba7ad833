"""Which forepage this is, also where it runs from a source tree that nobody installed."""

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "0+unknown"
"""A valid version (PEP 440) below every release."""


def release_version() -> str:
    """The installed distribution's version, or UNKNOWN without its metadata."""
    try:
        return version("forepage")
    except PackageNotFoundError:
        return UNKNOWN
