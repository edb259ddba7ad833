"""`forepage train ...`: one command a step of the recipe. Nothing here imports torch until a command runs."""

from pathlib import Path
from typing import Annotated

import typer

from forepage.errors import ForepageError
from forepage.training.indexer.commands import register

app = typer.Typer(no_args_is_help=True, help="Train forepage-tiny and its memory indexer.")
CONFIGS = Path(__file__).parent / "backbone" / "configs"
FAILED = 1


@app.callback()
def train() -> None:
    """Train forepage-tiny and its memory indexer."""


@app.command()
def backbone(
    out: Annotated[
        Path, typer.Option(help="folder of the run: checkpoint, log, export; resumed if it has one")
    ],
    config: Annotated[Path, typer.Option(help="TOML file of the whole run")] = CONFIGS / "tiny.toml",
    minutes: Annotated[
        float | None, typer.Option(help="stop training after so long; run again to go on")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="stop after so many steps")] = None,
    begin_at: Annotated[
        Path | None,
        typer.Option(help="model folder, or its safetensors file, whose weights a new run begins at"),
    ] = None,
    only_sparse: Annotated[
        bool,
        typer.Option(help="train the sparse stage alone, on --begin-at's weights or the folder's own"),
    ] = False,
    indexer: Annotated[
        bool,
        typer.Option(help="warm the indexers up at the end of this call, even if the backbone is not done"),
    ] = False,
    evaluate: Annotated[bool, typer.Option(help="score the test split at the end")] = True,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; none: a GPU if there is one")] = None,
) -> None:
    """Train the backbone by its curriculum; exports official-format weights at the end of every call."""
    from forepage.training.backbone.config import TrainingConfig
    from forepage.training.backbone.run import Order, run

    try:
        order = Order(
            TrainingConfig.read(config),
            out,
            begin_at=begin_at,
            only_sparse=only_sparse,
            minutes=minutes,
            steps=steps,
            indexer=indexer,
            evaluate=evaluate,
            device=device,
        )
        done = run(order)
    except ForepageError as error:
        typer.echo(f"forepage train backbone: {error}", err=True)
        raise typer.Exit(FAILED) from error
    typer.echo("done" if done else "stopped: run it again to go on")


register(app)
