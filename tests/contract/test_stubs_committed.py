"""The committed gRPC code is what the protos generate."""

from pathlib import Path

import pytest
from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fresh stubs: what `make protos` writes under services/."""
    out = tmp_path_factory.mktemp("stubs")
    outputs = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    assert protoc.main(["protoc", f"-I{ROOT / 'protos'}", *outputs, *map(str, PROTOS)]) == 0
    return out


def test_stubs_equal_the_committed_ones(generated: Path) -> None:
    fresh = {path.relative_to(generated): path.read_text() for path in generated.rglob("*_pb2*")}
    services = ROOT / "services"
    committed = {
        path.relative_to(services): path.read_text()
        for path in (services / "forepage").rglob("*_pb2*.py*")
        if path.suffix in {".py", ".pyi"}
    }
    assert len(fresh) == 3 * len(PROTOS)
    assert sorted(committed) == sorted(fresh)
    assert [str(path) for path in fresh if fresh[path] != committed[path]] == [], "run `make protos`"
