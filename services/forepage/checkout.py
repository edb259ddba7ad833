"""The checkout that this code runs from, as result files name it."""

import subprocess
from pathlib import Path


def commit_of_checkout() -> str | None:
    """Its commit, "-dirty" behind it if files were changed; None outside a work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
