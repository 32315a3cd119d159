"""`propulsion-export package`: what a server loads."""

from pathlib import Path
from typing import Any

import click

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY, output_options


@click.command(
    epilog="\b\nExample: propulsion-export package onnx/switchable -o served --layout genai"
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option(
    "--layout",
    type=click.Choice(["genai"]),
    required=True,
    help="genai: a causal language model for onnxruntime-genai.",
)
@output_options
@console_options
def command(console: Console, artifact: Path, output: Path, layout: Any, force: bool) -> None:
    """Write what a server loads, from an ONNX export.

    The output is a copy, which needs the export no more, and is an artifact itself: `run` and
    `parity` take it too.
    """
    from propulsion_export.pipeline.packaging import package

    with console.progress() as progress:
        made = package(artifact, output, layout=layout, force=force, progress=progress)
    names = sorted(made.adapters)
    value = {"package": str(output), "layout": layout, "bytes": size_of(output), "adapters": names}
    console.result(value, f"{output}: {layout}, {human_size(size_of(output))}, {', '.join(names)}")
