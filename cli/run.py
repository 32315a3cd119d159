"""`propulsion-export run`: predict with an artifact."""

import json
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import DIRECTORY, FILE, runner_option


@click.command(
    epilog='\b\nExample: propulsion-export run onnx/switchable --adapter topic --text "a large cat"'
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option("--text", multiple=True, help="A text; repeatable.")
@click.option("--inputs", type=FILE, help="A text a line, or JSONL with `text`.")
@click.option(
    "--adapter", multiple=True, metavar="NAME", help="One for all texts, or one for each."
)
@runner_option
@console_options
def command(console: Console, artifact: Path, **options: Any) -> None:
    """Predict with an artifact."""
    from propulsion_export.pipeline.predicting import predict

    predictions = predict(artifact, **options)
    lines = [
        f"{item['text']}\t{item['adapter']}\t"
        + json.dumps({k: v for k, v in item.items() if k not in ("text", "adapter")})
        for item in predictions
    ]
    console.result({"predictions": predictions}, "\n".join(lines))
