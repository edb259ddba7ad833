"""By hand, before a commit and in CI: the same commands in the same order."""

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"== %s\\n' '([^']+)'")
STEPS = ["ruff format --check", "ruff check", "mypy", "lint-imports", "pytest"]


def recipe(target: str) -> str:
    """What make would run for a target, without running it."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def headings(target: str) -> list[str]:
    return HEADING.findall(recipe(target))


def test_ci_runs_the_gate_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert len(lines) == 3
    assert re.fullmatch(r"exec make -C .* test", lines[2])


def test_gate_has_its_steps_in_order_with_headings() -> None:
    assert headings("test") == STEPS
    commands = re.findall(
        r"\.venv/bin/(ruff format --check|ruff check|mypy|lint-imports|pytest)", recipe("test")
    )
    assert commands == STEPS


def test_check_is_the_gate_without_tests() -> None:
    assert headings("check") == STEPS[:-1]


def test_pre_commit_runs_targets_of_the_gate() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["make lint", "make types", "make imports"]
    targets = [hook["entry"].removeprefix("make ") for hook in hooks]
    assert [heading for target in targets for heading in headings(target)] == STEPS[:-1]


def test_up_installs_the_local_extra_before_it_starts() -> None:
    text = recipe("up")
    assert text.index("-m venv .venv") < text.index(".[local]") < text.index("forepage up")
    assert ".[dev]" not in text


def test_help_lists_every_public_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("up", "test", "check", "format", "protos", "clean", "help"):
        assert re.search(rf"^{target}\s+\S", listed, re.MULTILINE)
        assert re.search(rf"^\.PHONY:.*\b{target}\b", makefile, re.MULTILINE)
