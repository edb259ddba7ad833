"""The `forepage` command: exit codes, one-line errors, masked secrets."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.errors import DependencyError, IntegrityError
from forepage.launch.up import announcement
from forepage.release import release_version
from forepage.settings import GatewaySettings, Settings


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def failing_role(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """The errors that the role's `run` raises, for the test to fill."""
    errors: list[Exception] = []

    async def main(_settings: Settings, _stop: asyncio.Event) -> None:
        raise errors[0]

    monkeypatch.setattr(cli, "import_module", lambda _name: SimpleNamespace(run=main))
    return errors


def test_check_prints_the_tree_with_secrets_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREPAGE_REDIS_URL", "redis://user:hush@host:6379")
    monkeypatch.setenv("FOREPAGE_COLDPOOL__TIERS", '["redis", "disk"]')
    code, output = run("check")
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert code == 0
    assert "hush" not in output
    assert rows["FOREPAGE_REDIS_URL"] == ["**********", "set"]
    assert rows["FOREPAGE_COLDPOOL__TIERS"] == ["[redis,", "disk]", "set"]
    assert rows["FOREPAGE_GATEWAY__PORT"] == ["8000", "default"]


@pytest.mark.parametrize("command", ["check", "coldpool", "index", "worker", "gateway", "up"])
@pytest.mark.parametrize("password", ["hush/hush", "hush#hush", "hush?hush"])
def test_a_password_that_breaks_its_url_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, command: str, password: str
) -> None:
    """Its first half stands where the port should; the client's own error would say it."""
    monkeypatch.setenv("FOREPAGE_REDIS_URL", f"redis://:{password}@host:6379")
    code, output = run(command)
    assert code == 2
    assert "FOREPAGE_REDIS_URL" in output
    assert "%2F" in output
    assert "hush" not in output


@pytest.mark.parametrize("command", ["check", "worker", "up"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOREPAGE_GATEWAY__PRT", "1"),
        ("FOREPAGE_GATEWAYS__PORT", "1"),
        ("FOREPAGE_GATEWAY__PORT", "99999"),
        ("FOREPAGE_WORKER__DEFAULT_MODE", "fast"),
        ("FOREPAGE_REDIS_URL", "http://host:6379"),
        ("FOREPAGE_REDIS_URL", "host:6379"),
        ("FOREPAGE_REDIS_URL", "redis://host:six"),
    ],
)
def test_wrong_setting_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    code, output = run(command)
    assert code == 2
    assert name in output
    assert len(output.splitlines()) == 1


def test_setting_that_is_no_json_list_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREPAGE_GATEWAY__WORKER_ADDRESSES", "a:1,b:2")
    code, output = run("check")
    assert code == 2
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("role", ["gateway", "index", "coldpool", "worker"])
def test_healthy_is_1_when_nothing_listens(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setenv("FOREPAGE_GATEWAY__PORT", "1")
    for name in ("INDEX", "COLDPOOL", "WORKER"):
        monkeypatch.setenv(f"FOREPAGE_{name}__LISTEN", "127.0.0.1:1")
    assert run("healthy", role) == (1, f"{role} is not ready\n")


@pytest.mark.parametrize("nested", [False, True])
def test_known_error_of_a_role_is_one_line(failing_role: list[Exception], nested: bool) -> None:
    error = DependencyError("cannot listen on 127.0.0.1:7103")
    failing_role.append(ExceptionGroup("tasks", [ExceptionGroup("inner", [error])]) if nested else error)
    assert run("worker") == (1, "forepage worker: cannot listen on 127.0.0.1:7103\n")


def test_broken_law_of_a_role_keeps_its_traceback(failing_role: list[Exception]) -> None:
    failing_role.append(IntegrityError("free + leased != total"))
    with pytest.raises(IntegrityError):
        run("worker")


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_torch(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "import_module", without_torch)
    assert run("worker") == (1, "forepage worker needs torch: pip install 'forepage[worker]'\n")


def test_a_misspelt_setting_is_told_which_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREPAGE_WORKER__BUDGET_BLOKS", "1")
    monkeypatch.setenv("FOREPAGE_SOMETHING", "1")
    _, output = run("check")
    assert "FOREPAGE_WORKER__BUDGET_BLOKS (meant: FOREPAGE_WORKER__BUDGET_BLOCKS?)" in output
    assert "FOREPAGE_SOMETHING, " in output, "nothing is near"
    code, table = run("settings-table")  # as it says there: whatever is set
    assert code == 0
    assert "BUDGET_BLOCKS" in table


def test_it_says_which_version_it_is() -> None:
    assert run("--version") == (0, f"forepage {release_version()}\n")


@pytest.mark.parametrize(("on_path", "said"), [(None, "env/bin/forepage"), ("/usr/bin/forepage", "forepage")])
def test_what_runs_says_how_this_shell_reaches_the_command(
    monkeypatch: pytest.MonkeyPatch, on_path: str | None, said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["env/bin/forepage", "up"])
    monkeypatch.setattr("shutil.which", lambda _name: on_path)
    text = announcement(Settings())
    assert f"in another terminal: `{said} status`, `{said} trace`" in text


def test_the_question_to_try_names_the_model_that_is_served_also_with_keys(tmp_path: Path) -> None:
    settings = Settings(gateway=GatewaySettings(api_keys=tmp_path / "keys.jsonl"))
    text = announcement(settings)
    assert '"model": "forepage-tiny"' in text
    assert "authorization: Bearer $KEY" in text
