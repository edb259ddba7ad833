"""The `forepage` command: one process a role, `up` for all of them on one host, and a few checks.

Each role's package is imported only when asked for, so the gateway's image needs no torch. A setting that
is wrong ends with one line and exit code 2; an error that we know by name with one line and exit code 1.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer

from forepage.console.cli import register as register_console
from forepage.errors import ForepageError, IntegrityError
from forepage.launch.health import Role, role_is_ready
from forepage.release import release_version
from forepage.settings import Settings
from forepage.settings_environment import SettingsError, load_settings
from forepage.settings_report import resolved_table, settings_markdown
from forepage.training.cli import app as train_app

BAD_SETTINGS = 2
FAILED = 1
HEALTH_TIMEOUT_S = 4.0
GPU_BYTES = 80 << 30

RoleMain = Callable[[Settings, asyncio.Event], Awaitable[None]]
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(train_app, name="train")
register_console(app)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"forepage {release_version()}")
        raise typer.Exit


@app.callback()
def forepage(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="which forepage this is")
    ] = False,
) -> None:
    """Serve DeepSeek-V4 at long context: one process a role, or all of them with `up`."""


def main() -> None:
    """Entry point of the console script and of `python -m forepage`."""
    app()


@app.command()
def gateway() -> None:
    """The HTTP edge: OpenAI-compatible API, admission, routing."""
    _run_role(Role.GATEWAY)


@app.command()
def index() -> None:
    """The lookahead index: plans and audits."""
    _run_role(Role.INDEX)


@app.command()
def coldpool() -> None:
    """The cold pool manager of this host: arena, leases, spill tiers."""
    _run_role(Role.COLDPOOL)


@app.command()
def worker() -> None:
    """A decode worker: one GPU, or the CPU."""
    _run_role(Role.WORKER)


@app.command()
def up() -> None:
    """Every process on this host, with a bundled Valkey where no Redis is set; Ctrl-C ends them all."""
    from forepage.launch.instance import LaunchError
    from forepage.launch.up import up as run

    settings = _settings()
    try:
        run(settings)
    except LaunchError as error:
        _fail(f"forepage up: {error}", FAILED)


@app.command()
def check(
    model_dir: Annotated[Path | None, typer.Argument(help="a model folder; none: the settings")] = None,
    gpu_bytes: Annotated[int, typer.Option(min=1, help="memory of one GPU")] = GPU_BYTES,
    host_bytes: Annotated[
        int | None, typer.Option(min=1, help="memory for the cold pool; none: all this host has")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="GPUs the model is split over; none: as few as hold it")
    ] = None,
) -> None:
    """Print the settings of this environment, secrets masked; or what a model folder holds and needs."""
    from forepage.model_report import Budget, ModelReport, print_report

    settings = _settings()
    if model_dir is None:
        typer.echo(resolved_table(settings))
        return
    try:
        # The question is about GPUs, so a dtype left to us is theirs unless the worker is to use the CPU.
        device = "cpu" if settings.model.device == "cpu" else "cuda"
        report = ModelReport.read(model_dir, settings.model.weight_dtype, device)
        print_report(report, settings, Budget(gpu_bytes, host_bytes or _memory_bytes()), ranks)
    except ForepageError as error:
        _fail(f"forepage check: {error}", FAILED)


@app.command("convert-indexer")
def convert_indexer(
    source: Annotated[Path, typer.Argument(help="a memory indexer as released: .pt")],
    target: Annotated[Path, typer.Argument(help="the file to write: .safetensors")],
) -> None:
    """Write a released memory indexer as .safetensors, by the same names and without its RoPE tables."""
    from forepage.model.indexer_tensors import convert

    try:
        count, layers = convert(source, target)
    except ForepageError as error:
        _fail(f"forepage convert-indexer: {error}", FAILED)
    typer.echo(f"{target}: {count} tensors for c4 layers {', '.join(map(str, layers))}")


@app.command("new-key")
def new_key(
    name: Annotated[str, typer.Argument(help="whose key it is; each name once")],
    keys: Annotated[Path, typer.Option("--keys", help="the file that FOREPAGE_GATEWAY__API_KEYS names")],
    tenant: Annotated[str, typer.Option(help="keys of the same tenant share cached prefixes")] = "",
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="requests at once; none: no limit")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="none: no limit")] = None,
) -> None:
    """Make an API key: printed once, kept as a digest. A gateway knows it from its next start on."""
    from forepage.gateway import api_keys

    try:
        if keys.exists() and any(name == key.name for key in api_keys.read_keys(keys).values()):
            _fail(f"forepage new-key: {keys} has a key of {name}: remove its line first", FAILED)
        key, kept = api_keys.new_key(
            name, tenant=tenant, max_concurrent=max_concurrent, requests_per_minute=requests_per_minute
        )
        keys.touch(mode=0o600)
        with keys.open("a", encoding="utf-8") as file:
            file.write(kept.model_dump_json(exclude_none=True) + "\n")
    except (OSError, SettingsError) as error:
        _fail(f"forepage new-key: {error}", FAILED)
    typer.echo(key)


@app.command("settings-table")
def settings_table() -> None:
    """Print docs/settings.md."""
    typer.echo(settings_markdown(), nl=False)


@app.command()
def healthy(role: Annotated[Role, typer.Argument(help="the process to ask, on this host")]) -> None:
    """Exit 0 when that process takes work, else 1: for container health checks."""
    if not asyncio.run(role_is_ready(role, _settings(), timeout_s=HEALTH_TIMEOUT_S)):
        _fail(f"{role} is not ready", FAILED)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _settings() -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        _fail(f"forepage: {error}", BAD_SETTINGS)


def _run_role(role: Role) -> None:
    settings = _settings()
    try:
        from forepage.rpc.edge import run_until_signal

        module = import_module(f"forepage.{role}.{'app' if role is Role.GATEWAY else 'server'}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("forepage"):
            raise
        _fail(f"forepage {role} needs {error.name}: pip install 'forepage[{role}]'", FAILED)
    run = cast(RoleMain, module.run)
    try:
        run_until_signal(lambda stop: run(settings, stop))
    except SettingsError as error:  # what only the role itself can see
        _fail(f"forepage {role}: {error}", BAD_SETTINGS)
    except (ForepageError, ExceptionGroup) as failure:
        cause = _only(failure)
        if not isinstance(cause, ForepageError) or isinstance(cause, IntegrityError):
            raise  # ours to mend: the traceback helps
        _fail(f"forepage {role}: {cause}", FAILED)


def _only(failure: Exception) -> Exception:
    """The one error inside groups of one."""
    while isinstance(failure, ExceptionGroup) and len(failure.exceptions) == 1:
        failure = failure.exceptions[0]
    return failure


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
