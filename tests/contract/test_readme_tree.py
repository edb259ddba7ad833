"""The README's tree is the repository: what it names exists, and nothing at the top is missing from it.

The block after `## Tree` has one path a line, indented under its folder; what follows on the line is prose.
Braces list alternatives, `*` and `<word>` stand for any name.
"""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services" / "forepage"
NOT_SOURCE = {"dist", "__pycache__"}


def tree_lines() -> list[str]:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^## Tree\s*$.*?^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, "README.md has no `## Tree` followed by a fenced block"
    return [line for line in found[1].splitlines() if line.strip()]


def tree_paths() -> Iterator[str]:
    """Every path of the block, from the root of the repository, braces spelled out."""
    folders: list[tuple[int, str]] = []
    for line in tree_lines():
        start = re.search(r"[\w.{<]", line)
        assert start, f"no path in {line!r}"
        while folders and folders[-1][0] >= start.start():
            folders.pop()
        name = line[start.start() :].split()[0]
        path = (folders[-1][1] if folders else "") + name
        if name.endswith("/"):
            folders.append((start.start(), path))
        yield from spelled_out(path)


def spelled_out(path: str) -> Iterator[str]:
    parts = re.split(r"\{(.*?)\}", re.sub(r"<\w+>", "*", path))
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    yield from ("".join(choice).rstrip("/") for choice in product(*choices))


def test_every_path_of_the_tree_exists() -> None:
    assert [path for path in tree_paths() if not any(ROOT.glob(path))] == []


def test_every_folder_at_the_top_is_in_the_tree() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - NOT_SOURCE - {path.partition("/")[0] for path in tree_paths()} == set()


def test_every_package_is_in_the_tree() -> None:
    packages = {str(path.parent.relative_to(ROOT)) for path in SERVICES.glob("*/__init__.py")}
    packages |= {"services/forepage", "kernels/forepage_kernels"}
    named = set(tree_paths())
    assert {
        package for package in packages if not any(f"{path}/".startswith(f"{package}/") for path in named)
    } == set()
