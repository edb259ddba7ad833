"""Put load on a running endpoint and report what its users saw.

    python -m loadtest.load shapes
    python -m loadtest.load run --shape ci --out out
    python -m loadtest.load run --shape mostly-recent --length 262144 --users 2 --mode exact --out out

Any OpenAI-compatible chat endpoint will do (`--plain` where it does not know the `forepage` field). Documents
are counted in characters, which are the tokens of forepage-tiny; the report says how many the server counted.
"""

from gevent import monkey

monkey.patch_all()  # before anything else imports ssl

import json
import shlex
import sys
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import gevent
import httpx
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.load.report import markdown, result_of, write
from loadtest.load.sample import Sample
from loadtest.load.shapes import SHAPES, Shape
from loadtest.load.users import LoadSettings, run_load
from loadtest.quality.arms import Arm, residency_fields

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
MODEL_WAIT_S, MODEL_POLL_S = 60.0, 0.5


@app.command()
def shapes() -> None:
    """Name the shapes of load."""
    for shape in SHAPES.values():
        users = max(stage.users for stage in shape.stages)
        typer.echo(f"{shape.name:14} {shape.what}; {users} users, {shape.seconds:.0f} s")


@app.command()
def run(
    shape: Annotated[str, typer.Option(help="which load; `shapes` names them")],
    out: Annotated[Path, typer.Option(help="folder for the JSON file, the table and the picture")],
    base_url: Annotated[str, typer.Option(help="the endpoint, with /v1")] = "http://127.0.0.1:8000/v1",
    seconds: Annotated[float | None, typer.Option(min=1, help="of the whole shape; none: its own")] = None,
    users: Annotated[float, typer.Option(min=0, help="so many times the shape's users")] = 1.0,
    length: Annotated[int | None, typer.Option(min=512, help="longest document; none: the shape's")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="of each length; none: the shape's")] = None,
    mode: Annotated[Arm, typer.Option(help="how requests are paged")] = Arm.GUARDED,
    budget_blocks: Annotated[
        int | None, typer.Option(help="blocks kept by score; none: the shape's or the server's")
    ] = None,
    plain: Annotated[bool, typer.Option(help="the endpoint doesn't know the `forepage` field")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of documents and questions")] = 0,
    model: Annotated[str | None, typer.Option(help="none: the first that the endpoint names")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="sent as a bearer token")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="the longest silence of a stream")] = 600.0,
    drain_s: Annotated[float, typer.Option(min=0, help="what answers under way at the end get")] = 60.0,
    device: Annotated[
        str, typer.Option(help="JSON: GPU name, host memory, what else the figures need")
    ] = "{}",
    name: Annotated[
        str | None, typer.Option(help="of the files, without the ending; none: load-SHAPE")
    ] = None,
) -> None:
    """Run one shape. Exit code 1 if a request failed other than by a refusal, or none was answered."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    chosen = SHAPES[shape].scaled(seconds=seconds, users=users, length_tokens=length, num_documents=documents)
    try:
        next(chosen.conversations(seed))  # before anyone is asked: documents may hold no such question
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--length") from error
    budget = budget_blocks or chosen.budget_blocks
    forepage = None if plain else residency_fields(mode, budget_blocks=budget, threshold=None)
    settings = LoadSettings(
        base_url=base_url,
        model=model or _first_model(base_url, api_key),
        forepage=forepage,
        api_key=api_key,
        timeout_s=timeout_s,
        drain_s=drain_s,
    )
    samples, took_s = _measure(chosen, settings, seed)
    result = result_of(
        chosen,
        samples,
        seconds=took_s,
        command=shlex.join(["python", "-m", "loadtest.load", *_shown_arguments(sys.argv[1:])]),
        device=_object(device),
        config={"model": settings.model, "forepage": forepage, "seed": seed},
    )
    write(out, name or f"load-{shape}", result, chosen, samples)
    typer.echo(markdown(result))
    total = result["rows"][0]
    if total["failed"] or not total["answered"]:
        typer.echo(f"failed: {total['errors'] or 'no request was answered'}", err=True)
        raise typer.Exit(1)


def _measure(shape: Shape, settings: LoadSettings, seed: int) -> tuple[list[Sample], float]:
    """The samples in the order their answers ended, and the seconds until the last of them did."""
    samples: list[Sample] = []
    conversations = shape.conversations(seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(shape.name, total=shape.seconds)
        began_s = monotonic()

        def show() -> None:
            while True:
                said = f"{len(samples)} answers, {sum(one.error is not None for one in samples)} failed"
                progress.update(bar, completed=monotonic() - began_s, description=said)
                gevent.sleep(0.5)

        showing = gevent.spawn(show)
        run_load(shape, conversations, settings, on_sample=samples.append)
        showing.kill()
    ended_s = max((one.sent_s + one.total_s for one in samples), default=shape.seconds)
    return samples, max(ended_s, 1e-9)


def _first_model(base_url: str, api_key: str | None) -> str:
    """The first model that the endpoint names; waits while it names none, as before its worker is there."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    give_up_s = monotonic() + MODEL_WAIT_S
    while monotonic() < give_up_s:
        try:
            response = httpx.get(f"{base_url}/models", headers=headers)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise typer.BadParameter(f"{base_url}: {error}") from error
        if models := response.json()["data"]:
            return str(models[0]["id"])
        gevent.sleep(MODEL_POLL_S)
    raise typer.BadParameter(f"{base_url} names no model: is its worker there?")


def _shown_arguments(arguments: list[str]) -> list[str]:
    """The command as it goes into a file: without the key."""
    shown: list[str] = []
    for argument in arguments:
        hide = shown[-1:] == ["--api-key"]
        shown.append("***" if hide else argument.partition("=")[0] if "--api-key=" in argument else argument)
    return shown


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--device is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("--device is not a JSON object")
    return value


if __name__ == "__main__":
    app()
