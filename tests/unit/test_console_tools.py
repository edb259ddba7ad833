"""`forepage eval` and `bench`: the tool of the source tree gets the arguments, its exit code is ours."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.console import source_tree
from forepage.console.source_tree import BENCHES, EVAL, SHADOW, Tool, run_tool
from forepage.errors import RequestError

TOOL = "import sys; print(*sys.argv[1:], sep='|', file=open(sys.argv[1], 'w')); sys.exit(5)"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree whose tools write their arguments into the file that the first one names."""
    for tool in (EVAL, SHADOW, *BENCHES.values()):
        place = tmp_path / tool.folder / tool.module.replace(".", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place.parent / "__init__.py").touch()
        (place / "__main__.py").write_text(TOOL)
    run_in_tree = run_tool

    def run_there(tool: Tool, arguments: list[str]) -> int:
        return run_in_tree(tool, arguments, root=tmp_path)

    monkeypatch.setattr(source_tree, "run_tool", run_there)
    return tmp_path


@pytest.mark.parametrize("command", [("eval",), ("eval", "shadow"), ("bench", "load"), ("bench", "kernels")])
def test_arguments_and_exit_code_are_the_tools(tree: Path, command: tuple[str, ...]) -> None:
    said = tree / "said"
    code, _ = run(*command, str(said), "run", "--shape", "ci", "--help")
    assert code == 5
    assert said.read_text() == f"{said}|run|--shape|ci|--help\n"


def test_unknown_tool_is_refused_with_those_there_are() -> None:
    code, output = run("bench", "nothing")
    assert code == 2
    assert all(name in output for name in BENCHES)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_help_teaches_by_examples(command: str) -> None:
    code, output = run(command, "--help")
    assert code == 0
    assert output.count(f"forepage {command} ") >= 3


def test_a_package_that_a_tool_needs_is_named_with_how_to_get_it(tree: Path) -> None:
    tool = Tool("loadtest.load", ".", "", needs=("json", "no_such_package"))
    with pytest.raises(RequestError, match=r"needs no_such_package: .*'\.\[dev\]'"):
        run_tool(tool, [], root=tree)


def test_without_a_source_tree_it_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="checkout of the repository"):
        run_tool(EVAL, [], root=tmp_path)


def test_every_tool_of_the_help_is_there() -> None:
    for tool in (EVAL, SHADOW, *BENCHES.values()):
        place = source_tree.ROOT / tool.folder / tool.module.replace(".", "/")
        assert (place / "__main__.py").exists() or place.with_suffix(".py").exists(), tool
