"""`propulsion-export run`: predict with an artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import DIRECTORY, FILE, runner_option

_SHOWN = 4  # numbers of an embedding


@click.command(
    epilog='\b\nExample: propulsion-export run onnx/switchable --adapter topic --text "a large cat"'
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option("--text", multiple=True, help="A text, or a question; repeatable.")
@click.option("--inputs", type=FILE, help="A text a line, or JSONL with `text`.")
@click.option(
    "--context", multiple=True, help="What a question is about: one for all, or one for each."
)
@click.option(
    "--adapter", multiple=True, metavar="NAME", help="One for all texts, or one for each."
)
@runner_option
@console_options
def command(console: Console, artifact: Path, **options: Any) -> None:
    """Predict with an artifact."""
    from propulsion_export.pipeline.predicting import predict

    predictions = predict(artifact, **options)
    lines = [f"{item['text']}\t{item['adapter']}\t{shown(item)}" for item in predictions]
    console.result({"predictions": predictions}, "\n".join(lines))


def shown(prediction: Mapping[str, Any]) -> str:
    """A prediction as people read it, on one line."""
    if "label" in prediction:
        return f"{prediction['label']} ({prediction['score']:.1%})"
    if "tokens" in prediction:
        return " ".join(f"{token['word']}/{token['label']}" for token in prediction["tokens"])
    if "answer" in prediction:
        where = f"characters {prediction['start']} to {prediction['end']}"
        return f"{prediction['answer']} ({prediction['score']:.1%}, {where})"
    if "filled" in prediction:
        return ", ".join(prediction["filled"])
    numbers = prediction["embedding"]
    first = " ".join(f"{number:g}" for number in numbers[:_SHOWN])
    return f"{first} ... ({len(numbers)} numbers, --json has them all)"
