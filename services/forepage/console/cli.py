"""`forepage status|trace|eval|bench`: this package's commands. Each imports what it needs when it runs."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from forepage.errors import ForepageError, RequestError
from forepage.settings import Settings
from forepage.settings_environment import SettingsError, load_settings

BAD_SETTINGS = 2
FAILED = 1
PLAIN_COLUMNS = 160
"""Width of what is not written to a terminal."""
_FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(status)
    app.command()(trace)
    app.command("eval", context_settings=_FORWARDED)(evaluate)
    app.command(context_settings=_FORWARDED)(bench)


def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="for scripts: everything as one JSON object")
    ] = False,
    index: Annotated[str | None, typer.Option(help="host:port of the index; none: the settings'")] = None,
    coldpool: Annotated[
        str | None, typer.Option(help="host:port of the cold pool; none: the settings'")
    ] = None,
) -> None:
    """Processes, models, devices, arena and running sequences at a glance.

    Asks gateway, workers, index and cold pool by the addresses of this
    environment's settings; where `forepage up` runs on this host, by those it
    chose. Exit code 0: all are ready; 1: some process is not.

    \b
    forepage status                      what runs here
    forepage status --json | jq .ready   true or false
    FOREPAGE_INSTANCE=b forepage status  of a second `forepage up`
    forepage status --index index:7101 --coldpool coldpool:7102
                                         in a container of compose.yaml
    """
    from forepage.console.status import read_status
    from forepage.console.status_view import status_json, status_view

    listens = {"index": index, "coldpool": coldpool}
    found = asyncio.run(read_status(_listening_at(_settings("status"), listens)))
    if as_json:
        typer.echo(json.dumps(status_json(found), indent=1))
    else:
        _print(status_view(found))
    if not found.all_ready:
        raise typer.Exit(FAILED)


def trace(
    request_id: Annotated[
        str | None,
        typer.Argument(help="an answer's id, its x-request-id header, or a trace id; none: list requests"),
    ] = None,
    spans: Annotated[
        Path | None, typer.Option(help="folder of spans; none: the running `forepage up`'s, or the settings'")
    ] = None,
    intervals: Annotated[int, typer.Option(min=2, help="lookahead intervals drawn; others are counted")] = 12,
    newest: Annotated[int, typer.Option(min=1, help="requests listed without an id")] = 20,
) -> None:
    """One request's timeline: admission, prefill, decode, and each interval's predict, load, wait and commit.

    Needs no Jaeger: processes keep their newest spans in files of bounded
    size (FOREPAGE_TELEMETRY__SPAN_DIR, FOREPAGE_TELEMETRY__SPAN_BYTES).
    `forepage up` and compose.yaml turn that on. A span is there half a second
    after its end; a request that still runs shows what has ended of it.

    \b
    predict  the index scores the history and answers with a plan
    load     blocks that the plan adds come from the cold pool
    wait     they are there; the running step ends first
    commit   the block table is swapped: attention sees them

    \b
    forepage trace                    the newest requests
    forepage trace chatcmpl-5f0c...   the one with this answer
    docker compose exec gateway forepage trace
    """
    from forepage.console.timeline import request_traces, trace_of
    from forepage.console.trace_view import list_view, trace_view
    from forepage.span_log import read_spans

    try:
        found = request_traces(read_spans(_span_folder(spans)))
        if request_id is None:
            _print(list_view(found[:newest]))
        else:
            _print(trace_view(trace_of(found, request_id), max_intervals=intervals))
    except ForepageError as error:
        _fail(f"forepage trace: {error}", FAILED)


def evaluate(context: typer.Context) -> None:
    """Accuracy, evidence recall and footprint of a running server, suite by suite, in every mode.

    Runs `python -m loadtest.quality` of the source tree, or loadtest.shadow; arguments go on to it.

    \b
    forepage eval suites                       what is asked
    forepage eval run --length 8192 --questions 20 --out a.jsonl
    forepage eval report a.jsonl --out folder  table, picture, JSON
    forepage eval run --help                   every option
    forepage eval matrix PLAN.toml --out a.jsonl
                                               suites, lengths and arms of a plan, over several servers
    forepage eval shadow --length 16384 --out folder
                                               was what answers said of their evidence true?
    """
    from forepage.console.source_tree import EVAL, SHADOW, run_tool

    if context.args[:1] == ["--help"]:
        typer.echo(context.get_help())
        return
    if context.args[:1] == ["shadow"]:
        _run("eval", lambda: run_tool(SHADOW, context.args[1:] or ["--help"]))
        return
    _run("eval", lambda: run_tool(EVAL, context.args or ["--help"]))


def bench(context: typer.Context) -> None:
    """Measure: kernels, decode steps, prefill, or a running endpoint under load.

    Runs a tool of the source tree; arguments behind its name go on to it.

    \b
    forepage bench kernels     every kernel against this GPU's own limits
    forepage bench decode      step times of decode on a GPU
    forepage bench prefill     how long a prompt takes to prefill
    forepage bench load run --shape ci --out folder
                               a running endpoint; needs no GPU here
    forepage bench load --help every option of one of them
    """
    from forepage.console.source_tree import BENCHES, run_tool

    name, *rest = context.args or ["--help"]
    if name == "--help":
        typer.echo(context.get_help())
        return
    if name not in BENCHES:
        _fail(f"forepage bench: no tool {name!r}; there are {', '.join(BENCHES)}", BAD_SETTINGS)
    _run("bench", lambda: run_tool(BENCHES[name], rest))


def _span_folder(given: Path | None) -> Path:
    """Where spans are kept. Raises: RequestError when nothing says so, or it is not there."""
    from forepage.launch.run_card import running_card

    folder = given
    if folder is None:
        settings = _settings("trace")
        card = running_card(settings.coldpool.shm_dir, settings.instance)
        folder = settings.telemetry.span_dir or (Path(card.span_dir) if card is not None else None)
    if folder is None:
        raise RequestError(
            "no `forepage up` of this instance runs here, and FOREPAGE_TELEMETRY__SPAN_DIR is not set: set "
            "it for every process, or name the folder with --spans (where `forepage up` has ended: spans/ in "
            "its run folder)"
        )
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}: no process has kept spans there")
    return folder


def _run(command: str, tool: Callable[[], int]) -> None:
    try:
        code = tool()
    except ForepageError as error:
        _fail(f"forepage {command}: {error}", FAILED)
    raise typer.Exit(code)


def _listening_at(settings: Settings, listens: dict[str, str | None]) -> Settings:
    """The tree with other addresses where they are given."""
    sections = {
        name: getattr(settings, name).model_copy(update={"listen": listen})
        for name, listen in listens.items()
        if listen is not None
    }
    return settings.model_copy(update=sections)


def _settings(command: str) -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        _fail(f"forepage {command}: {error}", BAD_SETTINGS)


def _print(view: object) -> None:
    """To a terminal in its width and colours, elsewhere in one wide enough for every column."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_COLUMNS
    console.print(view)


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(code)
