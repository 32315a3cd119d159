"""`propulsion-export train`: labelled text, or text to learn to write, in; an adapter out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from propulsion_export.base_model.tasks import TRAINED_TASKS

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
    type=click.Choice(TRAINED_TASKS),
    default="text-classification",
    show_default=True,
)
@click.option("--validation", type=FILE, help="[default: a tenth of DATA]")
@click.option("--text-column", help="Inputs.  [default: text, tokens, or prompt]")
@click.option(
    "--label-column",
    help="What is learnt of them.  [default: label, labels, or response; without it and without "
    "prompts, the texts themselves are learnt]",
)
@click.option(
    "--placement", default="all", show_default=True, help="attention, all, or a regex of paths."
)
@click.option("--degree", type=float, default=15, show_default=True, help="Power of the vectors.")
@click.option("--train-bias", is_flag=True, help="Train the wrapped layers' biases too.")
@click.option("--epochs", type=int, default=3, show_default=True)
@click.option(
    "--batch-size", type=int, default=32, show_default=True, help="Over all processes together."
)
@click.option(
    "--gradient-accumulation-steps",
    type=int,
    default=1,
    show_default=True,
    help="Parts that a batch is gone through in; saves memory.",
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Of vectors.")
@click.option(
    "--head-learning-rate", type=float, default=1e-2, show_default=True, help="Of a classifier's."
)
@click.option("--max-length", type=int, help="In tokens.  [default: 128, or 512 to generate]")
@click.option(
    "--packing",
    is_flag=True,
    help="Lay passages together into blocks of --max-length, none attending to another. "
    "text-generation only; a model that cannot keep them apart is refused.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--early-stopping", type=int, metavar="EPOCHS", help="Patience; keeps the best.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--no-head-only", is_flag=True, help="Skip a classifier's head-only comparison.")
@click.option("--resume", is_flag=True, help="Go on from where an interrupted run stopped.")
@output_options
@trust_option
@console_options
def command(
    console: Console, model: str, data: str, output: Path, no_head_only: bool, **options: Any
) -> None:
    """Train a Propulsion adapter on labelled text, or on text to write.

    Text generation learns the texts of a column `text`, or responses to prompts, each with an
    end-of-sequence token; no head is trained.

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
    if "validation_perplexity" in metrics:
        loss, perplexity = metrics["validation_loss"], metrics["validation_perplexity"]
        base, of_base = metrics["base_loss"], metrics["base_perplexity"]
        return (
            f"{output}: held-out loss {loss:.4f}, perplexity {perplexity:.4g} "
            f"(base model {base:.4f}, {of_base:.4g})"
        )
    accuracy = metrics["validation_accuracy"]
    alone = metrics.get("head_only_accuracy")
    beside = f" (head alone {alone:.1%})" if alone is not None else ""
    return f"{output}: held-out accuracy {accuracy:.1%}{beside}"
