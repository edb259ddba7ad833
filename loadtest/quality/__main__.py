"""Measure an endpoint's answers suite by suite, then make the report.

    python -m loadtest.quality run --length 8192 --length 65536 --questions 200 --out answers.jsonl
    python -m loadtest.quality report answers.jsonl --out loadtest/results

`run` can be stopped and started again: what the file of answers has is not asked twice.
"""

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from forepage.suites.registry import SUITES
from loadtest.quality.answers import Answer, AnswerFile, read_answers
from loadtest.quality.arms import Arm
from loadtest.quality.endpoint import Endpoint, first_model
from loadtest.quality.items import Document, generated
from loadtest.quality.matrix import Matrix, MatrixPlan, PlanError, taking_turns
from loadtest.quality.published import FormatError, read_longbench, read_longmemeval, read_ruler
from loadtest.quality.report import ablation_of, result_of, write
from loadtest.quality.runner import Runner, RunSettings
from loadtest.quality.tally import Tally

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
TEST_SEED = 1_000_000
"""Seeds of the report begin here."""


@app.command()
def suites() -> None:
    """Name the generated suites."""
    typer.echo("\n".join(SUITES))


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="file of raw answers, appended to")],
    base_url: Annotated[str, typer.Option(help="the endpoint, with /v1")] = "http://127.0.0.1:8000/v1",
    suite: Annotated[list[str] | None, typer.Option(help="a suite; several times; default: all")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="tokens of a prompt with its answer; several times")
    ] = None,
    arm: Annotated[list[Arm] | None, typer.Option(help="an arm; several times; default: all")] = None,
    questions: Annotated[int, typer.Option(min=1, help="questions of each suite and length")] = 200,
    per_document: Annotated[int, typer.Option(min=1, help="questions that share one document, at most")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="added to the documents' seeds")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="requests under way")] = 8,
    budget_blocks: Annotated[
        int | None, typer.Option(help="blocks kept by score; default: by the length, as a server does")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="an entry is wanted above it; default: the server's")
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="the endpoint doesn't know the `forepage` field: one arm, full")
    ] = False,
    model: Annotated[str | None, typer.Option(help="default: the first that the endpoint names")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="sent as a bearer token")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="of one request")] = 1800.0,
    ruler: Annotated[
        list[Path] | None, typer.Option(help="a RULER jsonl, instead of generated suites")
    ] = None,
    longmemeval: Annotated[Path | None, typer.Option(help="LongMemEval's JSON, likewise")] = None,
    longbench: Annotated[Path | None, typer.Option(help="LongBench-v2's JSON, likewise")] = None,
) -> None:
    """Ask, grade and write down; interrupted or failed, run the same command again."""
    try:
        documents = list(_published(ruler or [], longmemeval, longbench))
    except (FormatError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    unknown = sorted(set(suite or ()) - set(SUITES))
    if unknown:
        raise typer.BadParameter(f"no such suite: {', '.join(unknown)}; `suites` names them")
    arms = [Arm.FULL] if plain else arm or list(Arm)
    if documents:
        total, source = sum(len(document.items) for document in documents), iter(documents)
    else:
        cells = [(name, tokens) for tokens in length or [8192] for name in suite or SUITES]
        total = len(cells) * questions
        source = (
            document
            for name, tokens in cells
            for document in generated(
                name, tokens, num_questions=questions, per_document=per_document, first_seed=TEST_SEED + seed
            )
        )
    settings = RunSettings(arms, concurrency, budget_blocks, threshold, plain)
    _note(out, {"command": shlex.join(["python", "-m", "loadtest.quality", *sys.argv[1:]])})
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout_s)
    failed = asyncio.run(_run(client, model, AnswerFile(out), source, settings, total * len(arms)))
    if failed:
        typer.echo(f"{failed} requests failed; run the same command again", err=True)
        raise typer.Exit(1)


@app.command()
def matrix(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="TOML file of cells")],
    out: Annotated[Path, typer.Option(help="file of raw answers, appended to")],
    base_url: Annotated[
        list[str] | None, typer.Option(help="an endpoint, with /v1; several times: they share the work")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.05, help="stop asking after so long")] = None,
    seed: Annotated[int, typer.Option(min=0, help="added to the documents' seeds")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="requests under way at each endpoint")] = 16,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="sent as a bearer token")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="of one request")] = 300.0,
) -> None:
    """Ask a whole plan of suites, lengths and arms; stopped or failed, run the same command again."""
    try:
        wanted = MatrixPlan.read(plan)
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    _note(out, {"command": shlex.join(["python", "-m", "loadtest.quality", *sys.argv[1:]])})
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    urls = base_url or ["http://127.0.0.1:8000/v1"]
    clients = [httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_s) for url in urls]
    until_s = None if minutes is None else time.monotonic() + 60.0 * minutes
    tally = asyncio.run(_matrix(clients, AnswerFile(out), wanted, concurrency, TEST_SEED + seed, until_s))
    typer.echo(f"{tally.asked} answers, {tally.failed} failed; all were asked: {tally.is_whole}")
    if tally.failed or not tally.is_whole:
        raise typer.Exit(1)


@app.command()
def report(
    answers: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="files of raw answers")],
    out: Annotated[Path, typer.Option(help="folder for quality.json, .md and .png")],
    device: Annotated[str, typer.Option(help="JSON: GPU name, link, host memory, torch, triton")] = "{}",
    config: Annotated[str, typer.Option(help="JSON: settings that change the figures")] = "{}",
    name: Annotated[str, typer.Option(help="of the files, without the ending")] = "quality",
) -> None:
    """Make the report from what was written down."""
    found = [answer for path in answers for answer in read_answers(path)]
    if not found:
        raise typer.BadParameter("no answers in these files")
    commands = [command for path in answers for command in _commands(path)]
    result = result_of(
        found,
        command=" && ".join(commands),
        device=_object("device", device),
        config=_object("config", config),
    )
    write(out, result, name=name)
    typer.echo(f"{len(found)} answers, {len(result['rows'])} rows: {out / name}.json, .md, .png")


@app.command()
def ablation(
    runs: Annotated[
        list[str], typer.Argument(help="factor=value:file of raw answers, e.g. interval_steps=16:a.jsonl")
    ],
    out: Annotated[Path, typer.Option(help="folder for ablation.json and .md")],
    device: Annotated[str, typer.Option(help="JSON, as for `report`")] = "{}",
    config: Annotated[str, typer.Option(help="JSON, as for `report`")] = "{}",
) -> None:
    """Put runs of servers that differ in one setting side by side."""
    found: dict[tuple[str, str], list[Answer]] = {}
    commands: list[str] = []
    for run_ in runs:
        setting, _, path = run_.partition(":")
        factor, _, value = setting.partition("=")
        if not (value and Path(path).is_file()):
            raise typer.BadParameter(f"{run_}: not factor=value:file")
        found[factor, value] = list(read_answers(Path(path)))
        commands += _commands(Path(path))
    result = ablation_of(
        found,
        command=" && ".join(commands),
        device=_object("device", device),
        config=_object("config", config),
    )
    write(out, result, name="ablation", picture=False)
    typer.echo(f"{len(result['rows'])} rows: {out / 'ablation'}.json, .md")


async def _matrix(
    clients: list[httpx.AsyncClient],
    answers: AnswerFile,
    plan: MatrixPlan,
    concurrency: int,
    first_seed: int,
    until_s: float | None,
) -> Tally:
    """Run with a progress bar; closes what it is given."""
    total, done = plan.num_answers, len(answers.done)
    with Tally.shown(total=total, done=done) as tally:
        try:
            endpoints = [Endpoint(client, await first_model(client)) for client in clients]
            running = Matrix(endpoints, answers, concurrency, tally.add, until_s)
            tally.is_whole = await running.run(taking_turns(plan.cells(), first_seed))
        finally:
            answers.close()
            for client in clients:
                await client.aclose()
    return tally


async def _run(
    client: httpx.AsyncClient,
    model: str | None,
    answers: AnswerFile,
    documents: Iterable[Document],
    settings: RunSettings,
    total: int,
) -> int:
    """Run with a progress bar; how many requests failed."""
    with Tally.shown(total=total, done=len(answers.done)) as tally:
        async with client:
            endpoint = Endpoint(client, model or await first_model(client))
            try:
                await Runner(endpoint, answers, settings, tally.add).run(documents)
            finally:
                answers.close()
    return tally.failed


def _published(ruler: list[Path], longmemeval: Path | None, longbench: Path | None) -> Iterator[Document]:
    for path in ruler:
        yield from read_ruler(path)
    if longmemeval is not None:
        yield from read_longmemeval(longmemeval)
    if longbench is not None:
        yield from read_longbench(longbench)


def _note(answers: Path, note: dict[str, Any]) -> None:
    """Beside the answers: the commands that made them."""
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.with_suffix(".commands").open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def _commands(answers: Path) -> list[str]:
    path = answers.with_suffix(".commands")
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(str(json.loads(line)["command"]) for line in lines))


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"--{name} is not a JSON object")
    return value


if __name__ == "__main__":
    app()
