"""Runs the measuring tools of the source tree, which no image and no wheel contains."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from forepage.errors import RequestError

ROOT = Path(__file__).parents[3]
"""The repository, where this is an editable install of one."""


@dataclass(frozen=True)
class Tool:
    """`python -m module` in `folder` of the repository; `what` is said in help texts."""

    module: str
    folder: str
    what: str
    needs: tuple[str, ...] = ()
    """Packages that only the development environment has."""


EVAL = Tool("loadtest.quality", ".", "accuracy, evidence recall and footprint, suite by suite, over HTTP")
SHADOW = Tool(
    "loadtest.shadow",
    ".",
    "what answers said of their evidence, checked by a second pass",
    needs=("httpx", "matplotlib"),
)
BENCHES = {
    "kernels": Tool("bench", "kernels", "every kernel against this GPU's own limits"),
    "decode": Tool("loadtest.decode", ".", "step times of decode on a GPU"),
    "throughput": Tool(
        "loadtest.throughput", ".", "sequences that fit and tokens/s, by what is kept on a GPU"
    ),
    "prefill": Tool("loadtest.prefill", ".", "how long a prompt takes to prefill"),
    "load": Tool(
        "loadtest.load",
        ".",
        "TTFT, ITL, recall and footprint of a running endpoint under load",
        needs=("gevent", "locust", "matplotlib"),
    ),
}


def run_tool(tool: Tool, arguments: Sequence[str], *, root: Path = ROOT) -> int:
    """Run it to its end with our own interpreter; its exit code.

    Raises: RequestError where the source tree, or a package that the tool needs, is not there.
    """
    folder = (root / tool.folder).resolve()
    place = folder / tool.module.replace(".", "/")
    if not (place / "__main__.py").exists() and not place.with_suffix(".py").exists():
        raise RequestError(
            f"{place} is not there: this needs a checkout of the repository and "
            "`pip install --editable '.[dev]'` in it; images and wheels do not hold the measuring tools"
        )
    missing = [name for name in tool.needs if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"{tool.module} needs {', '.join(missing)}: "
            f"`{sys.executable} -m pip install --editable '.[dev]'` in {root.resolve()}"
        )
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.run(
        [sys.executable, "-P", "-m", tool.module, *arguments], env=environ, check=False
    ).returncode
