"""What no file of the product may do, read from its syntax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("services", "kernels", "loadtest")
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_TEXT = {"eval", "exec"}
READS_ENVIRONMENT = {
    "services/forepage/settings_environment.py",
    "services/forepage/telemetry.py",  # OTEL_*, which are the SDK's
    "services/forepage/model/rank_group.py",  # gloo's own
    "services/forepage/launch/wiring.py",  # handed to children whole
    "services/forepage/console/source_tree.py",  # the same
    "loadtest/soak/__main__.py",  # the same
    "loadtest/throughput/system.py",  # the same
}
EVERYBODY_WRITES = ("/tmp", "/var/tmp")


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.AST) -> str:
    """`torch.load` for the expression of that name, else what is known of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def unpickling(tree: ast.AST) -> Iterator[str]:
    """Calls that would run what a file says."""
    for name, call in calls(tree):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name.split(".")[0] in UNPICKLERS or name in RUNS_TEXT or name == "yaml.load":
            yield name
        if name == "torch.load":
            only = given.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                yield name
        if name.endswith("np.load") or name == "numpy.load":
            allowed = given.get("allow_pickle")
            if isinstance(allowed, ast.Constant) and allowed.value:
                yield name


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 200


def test_nothing_is_unpickled() -> None:
    assert [(path, found) for path, tree in trees() for found in unpickling(tree)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_what_would_unpickle_is_seen(text: str) -> None:
    assert list(unpickling(ast.parse(text)))


def test_one_place_opens_tensor_files_with_the_formats_library() -> None:
    """The others ask it, so that every header is checked by ourselves first (fault/test_claimed_sizes)."""
    readers = {"safe_open", "load_file", "load_model", "deserialize", "load"}
    found = {
        path
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safetensors"
        if readers & {alias.name for alias in node.names}
    }
    assert found == {"services/forepage/model/safetensors_file.py"}


def test_only_the_settings_read_our_environment() -> None:
    found = {
        path
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node) in {"os.environ", "os.getenv"}
    }
    assert found == READS_ENVIRONMENT


def test_no_fixed_path_in_a_folder_that_everybody_writes() -> None:
    found = [
        (path, node.value)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith(EVERYBODY_WRITES)
    ]
    assert found == []
