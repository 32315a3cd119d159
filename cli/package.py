"""`propulsion-export package`: what a server loads."""

from pathlib import Path
from typing import Any

import click

from propulsion_export.packaging.layouts import LAYOUTS

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY, output_options


@click.command(epilog="\b\nExample: propulsion-export package onnx/bank -o models --layout triton")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option(
    "--layout",
    type=click.Choice(tuple(LAYOUTS)),
    required=True,
    help=". ".join(f"{name}: {layout.summary}" for name, layout in LAYOUTS.items()) + ".",
)
@click.option(
    "--model-name", metavar="NAME", help="What Triton's clients ask for.  [default: that of -o]"
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    help="Rows that Triton puts together.  [default: 32, or what an engine takes]",
)
@output_options
@console_options
def command(console: Console, artifact: Path, output: Path, layout: Any, **options: Any) -> None:
    """Write what a server loads, from an ONNX export or, for Triton, from an engine too.

    The output needs the input no more. Of genai and onnx-adapter it is a copy with the server's
    files, and an artifact itself: `run` and `parity` take it too. Of triton it is a model
    repository that holds the adapters of this moment: `--model-name topics` makes
    models/topics/config.pbtxt and models/topics/1.
    """
    from propulsion_export.pipeline.package import package

    with console.progress() as progress:
        made = package(artifact, output, layout=layout, progress=progress, **options)
    value = {
        "package": str(output),
        "layout": layout,
        "bytes": size_of(output),
        "adapters": list(made.adapters),
        "model_name": made.model_name,
    }
    told = f"{output}: {layout}, {human_size(size_of(output))}, {', '.join(made.adapters)}"
    console.result(value, f"{told}\nNext: {made.next_command}")
