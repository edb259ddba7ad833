"""`forepage train dump | indexer | calibrate | lookahead | synthetic-dump`: the memory indexer's commands.

Nothing here imports torch until a command runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from forepage.errors import ForepageError

if TYPE_CHECKING:
    from forepage.training.indexer.config import IndexerTrainingConfig

FAILED = 1
TINY = Path(__file__).parent / "configs" / "tiny.toml"
T = TypeVar("T")

Out = Annotated[Path, typer.Option(help="folder of the run: dump, indexer, export, training.json")]
Config = Annotated[Path, typer.Option(help="TOML file of dump, labels, fit and calibration")]
Model = Annotated[Path, typer.Option(help="the backbone's folder: config.json and weights")]
OptionalModel = Annotated[
    Path | None, typer.Option(help="the backbone's folder, for start = native; only its indexers are read")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; none: a GPU if there is one")]
Minutes = Annotated[float | None, typer.Option(help="stop after so long; run again to go on")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (dump, indexer, calibrate, lookahead):
        app.command()(command)
    app.command("synthetic-dump")(synthetic_dump)


def dump(
    model: Model, out: Out, config: Config = TINY, minutes: Minutes = None, device: Device = None
) -> None:
    """Run the backbone over the config's texts; write hidden states, indexer keys and golden labels."""
    from forepage.training.indexer.dump import DumpOrder
    from forepage.training.indexer.stages import chosen_device, run_dump

    def run() -> bool:
        order = DumpOrder(model, _read(config), out / "dump", chosen_device(device), minutes=minutes)
        return run_dump(order, out)

    _finish(_guarded(run, "dump"))


def indexer(
    out: Out,
    config: Config = TINY,
    model: OptionalModel = None,
    minutes: Minutes = None,
    device: Device = None,
) -> None:
    """Train the memory indexer on the dump; the backbone is not loaded."""
    from forepage.training.indexer.stages import FitOrder, chosen_device, run_fit

    def run() -> bool:
        order = FitOrder(out / "dump", _read(config), out / "indexer", chosen_device(device), model, minutes)
        return run_fit(order, out)

    _finish(_guarded(run, "indexer"))


def calibrate(out: Out, config: Config = TINY, device: Device = None) -> None:
    """Choose threshold, target layers and budget on the validation texts; write what is served."""
    from forepage.training.indexer.saved import table
    from forepage.training.indexer.stages import FitOrder, chosen_device, run_calibration

    def run() -> str:
        order = FitOrder(out / "dump", _read(config), out / "indexer", chosen_device(device))
        return table(run_calibration(order, out / "export", out))

    typer.echo(_guarded(run, "calibrate"))


def lookahead(
    model: Model,
    out: Out,
    config: Config = TINY,
    dump_minutes: Annotated[float | None, typer.Option(help="most time for the dump")] = None,
    indexer_minutes: Annotated[float | None, typer.Option(help="most time for the training")] = None,
    device: Device = None,
) -> None:
    """All of it from a backbone's folder: dump, indexer, calibrate. A part that is bounded may stop early."""
    from forepage.training.indexer.dump import DumpOrder
    from forepage.training.indexer.saved import table
    from forepage.training.indexer.stages import (
        FitOrder,
        chosen_device,
        run_calibration,
        run_dump,
        run_fit,
    )

    def run() -> str:
        read, on = _read(config), chosen_device(device)
        run_dump(DumpOrder(model, read, out / "dump", on, minutes=dump_minutes), out)
        order = FitOrder(out / "dump", read, out / "indexer", on, model, indexer_minutes)
        run_fit(order, out)
        return table(run_calibration(order, out / "export", out))

    typer.echo(_guarded(run, "lookahead"))


def synthetic_dump(
    out: Out,
    config: Config = TINY,
    model: Annotated[
        Path | None, typer.Option(help="folder with a config.json; none: the config's [model]")
    ] = None,
) -> None:
    """Write features of no model at a model's sizes, with a rule to learn: for speed and memory."""
    from forepage.errors import RequestError
    from forepage.model.spec import read_config
    from forepage.training.indexer.synthetic import synthetic_dump as write

    def run() -> int:
        read = _read(config)
        sizes = read.model if model is None else read_config(model)
        if sizes is None:
            raise RequestError(f"{config}: has no [model]; name a folder with --model", "model")
        return write(read, sizes, out / "dump")

    typer.echo(f"{_guarded(run, 'synthetic-dump')} rows")


def _read(path: Path) -> "IndexerTrainingConfig":
    from forepage.training.indexer.config import IndexerTrainingConfig

    return IndexerTrainingConfig.read(path)


def _guarded(run: Callable[[], T], name: str) -> T:
    """An error that we know by name ends in one line."""
    try:
        return run()
    except ForepageError as error:
        typer.echo(f"forepage train {name}: {error}", err=True)
        raise typer.Exit(FAILED) from error


def _finish(done: bool) -> None:
    typer.echo("done" if done else "stopped: run it again to go on")
