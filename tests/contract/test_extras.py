"""An image installs one extra: what a role's modules import, that extra brings."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SERVER_OF_ROLE = {
    "gateway": "forepage.gateway.app",
    "index": "forepage.index.server",
    "coldpool": "forepage.coldpool.server",
    "worker": "forepage.worker.server",
}
ROOT = Path(__file__).parents[2]
OURS = ("forepage", "forepage_kernels")


@pytest.mark.parametrize("role", SERVER_OF_ROLE)
def test_extra_brings_what_its_role_imports(role: str) -> None:
    names = {name for path in modules_loaded_by(SERVER_OF_ROLE[role]) for name in imports_of(path)}
    foreign = names - set(OURS) - sys.stdlib_module_names
    distributions = packages_distributions()
    brought = closure("forepage", role)
    assert {name for name in foreign if not brought & set(map(normal, distributions.get(name, ())))} == set()


def modules_loaded_by(module: str) -> list[Path]:
    """Files of ours that a process of this role has loaded at its start."""
    code = (
        f"import sys, forepage.__main__, forepage.rpc.edge, {module}\n"
        f"print(*(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] in {OURS}), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def imports_of(path: Path) -> Iterator[str]:
    """Top-level names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@cache
def closure(name: str, extra: str = "") -> frozenset[str]:
    """Distributions that installing name[extra] brings."""
    found = {normal(name)}
    for text in requirements(name, extra):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for wanted in ("", *requirement.extras):
                found |= closure(requirement.name, wanted)
    return frozenset(found)


def requirements(name: str, extra: str) -> list[str]:
    """Ours from pyproject.toml, as an image would install it; others from what is installed here."""
    if name == "forepage":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:  # an optional speed-up of a dependency: nothing of ours imports it
        return []


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
