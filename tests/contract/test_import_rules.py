"""Imports point one way, and what must not need torch does not load it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "triton", "forepage_kernels"}
SERVICES = ROOT / "services" / "forepage"
LIGHT_PACKAGES = ("kv", "text", "coldpool", "gateway", "console", "launch", "rpc")
LIGHT_MODULES = sorted(
    ".".join(path.relative_to(SERVICES.parent).with_suffix("").parts)
    for package in LIGHT_PACKAGES
    for path in (SERVICES / package).rglob("*.py")
    if path.name != "__init__.py"
)


def test_import_contracts_hold() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["forepage.gateway.app", "forepage.coldpool.server", "forepage.__main__"])
def test_process_without_a_model_loads_no_torch(module: str) -> None:
    assert loaded_by(module) & HEAVY == set()


def test_no_light_module_loads_torch() -> None:
    assert loaded_by(*LIGHT_MODULES) & HEAVY == set()


def test_command_line_is_light_before_a_role_is_chosen() -> None:
    assert loaded_by("forepage.__main__") & {"grpc", "fastapi", "redis"} == set()


def loaded_by(*modules: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
