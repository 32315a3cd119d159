"""`propulsion-export trt`: an engine from an ONNX export."""

from pathlib import Path
from typing import Any

import click

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY, FILE, output_options, runtime_option, target_option


@click.command(
    epilog="\b\nExample: propulsion-export trt onnx/switchable -o engines/switchable "
    "--target sm_89 --max-shapes input_ids:32x256"
)
@click.argument("artifact", metavar="ONNX_DIR", type=DIRECTORY)
@runtime_option
@target_option
@click.option("--min-shapes", metavar="NAME:1x8,...", help="Smallest shapes, trtexec's syntax.")
@click.option("--opt-shapes", metavar="NAME:8x128,...", help="Shapes to be best at.")
@click.option(
    "--max-shapes",
    metavar="NAME:32x512,...",
    help="Largest shapes; default: 32 rows of the model's positions, at most 512 tokens, or with a "
    "cache 2048. With any shapes given, a decoder has one profile instead of three.",
)
@click.option("--refit", type=click.Choice(["none", "scales"]), default="none", show_default=True)
@click.option(
    "--bank",
    type=click.Choice(["input", "constant"]),
    default="input",
    show_default=True,
    help="Fed with each run, or its rows of now built in.",
)
@click.option("--timing-cache", type=FILE, help="Read where it exists, then written.")
@click.option("--builder-optimization-level", type=click.IntRange(0, 5))
@click.option("--version-compatible", is_flag=True)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
)
@click.option("--strip-weights", is_flag=True, help="Leave the weights out of the engine.")
@click.option("--workspace", type=click.IntRange(1, 2**24), metavar="MIB", help="Scratch memory.")
@output_options
@console_options
def command(console: Console, artifact: Path, output: Path, force: bool, **options: Any) -> None:
    """Build a TensorRT or TensorRT-RTX engine from an ONNX export.

    Precision is the graph's: choose it with `onnx --dtype`. TensorRT-RTX builds without a GPU.
    """
    from propulsion_export.engine import BuildOptions, parse_shapes
    from propulsion_export.pipeline.trt import build_engine

    for name in ("min_shapes", "opt_shapes", "max_shapes"):
        options[name] = parse_shapes(options[name]) if options[name] else {}
    with console.progress() as progress:
        made = build_engine(
            artifact, output, BuildOptions(**options), force=force, progress=progress
        )
    engine = made.manifest.engine
    assert engine is not None
    size = size_of(output / "model.engine")
    console.result(
        {
            "artifact": str(output),
            "bytes": size,
            "runtime": engine.runtime,
            "version": engine.version,
            "targets": engine.targets,
            "inputs": [spec.name for spec in made.manifest.inputs],
        },
        f"{output}: {engine.runtime} {engine.version} for {', '.join(engine.targets)}, "
        f"{human_size(size)}, inputs {', '.join(spec.name for spec in made.manifest.inputs)}",
    )
