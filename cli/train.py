"""`propulsion-export train`: labelled text in, an adapter out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import FILE, output_options, trust_option


@click.command(
    epilog="\b\nExample: propulsion-export train -m ./all-MiniLM-L6-v2 -d train.jsonl "
    "--validation held-out.jsonl -o adapters/topic"
)
@click.option("-m", "--model", required=True, help="Base model, path or name.")
@click.option(
    "-d",
    "--data",
    required=True,
    help="JSONL, CSV or Parquet file, a directory that `datasets` loads, or owner/name on a hub.",
)
@click.option(
    "--task",
    type=click.Choice(["text-classification", "token-classification"]),
    default="text-classification",
    show_default=True,
)
@click.option("--validation", type=FILE, help="[default: a tenth of DATA]")
@click.option("--text-column", help="[default: text, or tokens]")
@click.option("--label-column", help="[default: label, or labels]")
@click.option(
    "--placement", default="all", show_default=True, help="attention, all, or a regex of paths."
)
@click.option("--degree", type=float, default=15, show_default=True, help="Power of the vectors.")
@click.option("--train-bias", is_flag=True, help="Train the wrapped layers' biases too.")
@click.option("--epochs", type=int, default=3, show_default=True)
@click.option(
    "--batch-size", type=int, default=32, show_default=True, help="Over all processes together."
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Of vectors.")
@click.option("--head-learning-rate", type=float, default=1e-2, show_default=True)
@click.option("--max-length", type=int, default=128, show_default=True, help="In tokens.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--early-stopping", type=int, metavar="EPOCHS", help="Patience; keeps the best.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--no-head-only", is_flag=True, help="Skip the head-only comparison.")
@click.option("--resume", is_flag=True, help="Go on from where an interrupted run stopped.")
@output_options
@trust_option
@console_options
def command(
    console: Console, model: str, data: str, output: Path, no_head_only: bool, **options: Any
) -> None:
    """Train a Propulsion adapter on labelled text.

    Writes the PEFT adapter, metrics.json, loss-curve.png and a model card. Under `accelerate
    launch` several processes train together.
    """
    from propulsion_export.training import TrainOptions, train

    if os.environ.get("RANK", "0") != "0":  # of several processes, the first tells
        console = Console(json=False, quiet=True)
    chosen = TrainOptions(head_only=not no_head_only, **options)
    with console.progress() as progress:
        result = train(model, data, output, options=chosen, progress=progress)
    for note in result.notes:
        console.note(note)
    console.result(
        {"adapter": str(result.directory), **result.metrics}, _text(result.metrics, output)
    )


def _text(metrics: Mapping[str, Any], output: Path) -> str:
    accuracy = metrics["validation_accuracy"]
    alone = metrics.get("head_only_accuracy")
    beside = f" (head alone {alone:.1%})" if alone is not None else ""
    return f"{output}: held-out accuracy {accuracy:.1%}{beside}"
