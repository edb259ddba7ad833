"""The version that a process names, installed or not."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import forepage
from forepage.release import UNKNOWN, release_version


def test_version_is_the_installed_one() -> None:
    assert release_version() == version("forepage")


def test_version_is_unknown_in_a_bare_source_tree() -> None:
    sources = Path(forepage.__file__).parents[1]
    script = (
        f"import sys; sys.path[:0] = [{str(sources)!r}]\n"
        "from forepage.release import release_version; print(release_version())"
    )
    # -S: no site-packages, so no metadata; -I: no PYTHONPATH either
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == UNKNOWN
