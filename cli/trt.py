"""`propulsion-export trt`: build an engine from an ONNX export."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY, FILE, output_options, runtime_option, target_option

if TYPE_CHECKING:
    from propulsion_export.artifacts.artifact import Artifact


class BuildArguments(TypedDict):
    """The options that go to `BuildOptions` as they are."""

    refit: Literal["none", "scales"]
    bank: Literal["input", "constant"] | None
    timing_cache: Path | None
    builder_optimization_level: int | None
    version_compatible: bool
    hardware_compatibility: Literal["none", "ampere+", "same-cc"]
    strip_weights: bool
    workspace: int | None


@click.command(
    epilog="\b\nExample: propulsion-export trt onnx/switchable -o engines/switchable "
    "--target sm_89 --max-shapes input_ids:32x256"
)
@click.argument("artifact", metavar="ONNX_DIR", type=DIRECTORY)
@runtime_option
@target_option
@click.option("--min-shapes", metavar="NAME:1x8,...", help="Smallest shapes, in trtexec's syntax.")
@click.option("--opt-shapes", metavar="NAME:8x128,...", help="Shapes to optimise for.")
@click.option(
    "--max-shapes",
    metavar="NAME:32x512,...",
    help="Largest shapes; if any are given, a decoder has one profile instead of three.  "
    "[default: 32 rows of as many tokens as the model has positions, at most 512, or 2048 with a "
    "cache]",
)
@click.option(
    "--refit",
    type=click.Choice(["none", "scales"]),
    default="none",
    show_default=True,
    help="scales: build the scales in as weights that can be refitted, not as an input.",
)
@click.option(
    "--bank",
    type=click.Choice(["input", "constant"]),
    help="Bank fed with each run, or the rows it has now built in.  [default: input]",
)
@click.option("--timing-cache", type=FILE, help="Cache file that speeds up later builds.")
@click.option(
    "--builder-optimization-level",
    type=click.IntRange(0, 5),
    help="0: fast build, 5: long search.  [default: the runtime's]",
)
@click.option(
    "--version-compatible", is_flag=True, help="Run in later versions of the runtime too."
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
    help="Run on other GPUs too: Ampere and later, or the same compute capability.",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Leave the weights out of the engine; they are read from the ONNX when it is loaded.",
)
@click.option(
    "--workspace", type=click.IntRange(1, 2**24), metavar="MIB", help="Scratch memory in MiB."
)
@output_options
@console_options
def command(
    console: Console,
    *,
    artifact: Path,
    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] | None,
    targets: tuple[str, ...],
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    output: Path,
    force: bool,
    **options: Unpack[BuildArguments],
) -> None:
    """Build a TensorRT or TensorRT-RTX engine from an ONNX export.

    The precision is that of the graph, chosen by `onnx --dtype`. TensorRT-RTX builds without a GPU.
    """
    from propulsion_export.engine import BuildOptions, parse_shapes
    from propulsion_export.pipeline.trt import build_engine

    build = BuildOptions(
        runtime=runtime or BuildOptions.runtime,
        targets=targets or BuildOptions.targets,
        min_shapes=parse_shapes(min_shapes) if min_shapes else {},
        opt_shapes=parse_shapes(opt_shapes) if opt_shapes else {},
        max_shapes=parse_shapes(max_shapes) if max_shapes else {},
        **options,
    )
    with console.progress() as progress:
        built = build_engine(artifact, output, build, force=force, progress=progress)
    _print_result(console, built)


def _print_result(console: Console, built: "Artifact") -> None:
    engine, output = built.manifest.engine, built.directory
    assert engine is not None
    size, inputs = size_of(output / "model.engine"), [spec.name for spec in built.manifest.inputs]
    console.result(
        {
            "artifact": str(output),
            "bytes": size,
            "runtime": engine.runtime,
            "version": engine.version,
            "targets": engine.targets,
            "inputs": inputs,
        },
        f"{output}: {engine.runtime} {engine.version} for {', '.join(engine.targets)}, "
        f"{human_size(size)}, inputs {', '.join(inputs)}",
    )
