"""Options that several commands share, with one meaning and one help text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from propulsion_export.environment.paths import user_path
from propulsion_export.runners.table import RUNNER_NAMES

P = ParamSpec("P")
R = TypeVar("R")


class HomePath(click.Path):
    """A path in which `~` means the home directory even if no shell has expanded it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        super().convert(value, param, ctx)
        return user_path(value)


DIRECTORY = HomePath(file_okay=False)
FILE = HomePath(dir_okay=False)

model_option = click.option(
    "-m",
    "--model",
    help="Base model: path, GGUF file or name.  [default: the one that the adapter names]",
)
_MODES = click.Choice(["folded", "switchable", "bank"])
_MODE = "Adapter folded into the weights, an optional input, or one for each row of a batch."
mode_option = click.option("--mode", type=_MODES, default="folded", show_default=True, help=_MODE)
modes_option = click.option(
    "--mode",
    type=_MODES,
    multiple=True,
    default=["folded"],
    show_default=True,
    help=f"{_MODE} Repeatable: one trace, and a directory in -o for each.",
)
task_option = click.option(
    "--task", default="auto", show_default=True, help="Task of the model, which decides its head."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Type of weights and activations; keep: the checkpoint's.",
)
untie_option = click.option(
    "--untie", is_flag=True, help="Copy a tied weight that the adapter scales."
)
runner_option = click.option(
    "--runner",
    type=click.Choice(RUNNER_NAMES),
    default="auto",
    show_default=True,
    help="Runtime to run the artifact in.",
)
runtime_option = click.option(
    "--runtime",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    help="Which of the two builds the engine.  [default: auto, tensorrt if it and a GPU are here]",
)
target_option = click.option(
    "--target",
    "targets",
    multiple=True,
    help="GPU architecture such as sm_89; `doctor` lists those of tensorrt-rtx. Repeatable.  "
    "[default: auto, this machine's GPU]",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code from the model directory."
)

_QUANTISATION = (
    click.option(
        "--quantize",
        type=click.Choice(["int4", "int8"]),
        help="Quantise the weights of linear layers; adapters change their scales only.",
    ),
    click.option(
        "--quantization-form",
        type=click.Choice(["matmulnbits", "qdq"]),
        help="Operators: ONNX Runtime's own, or QDQ, for TensorRT too.  [default: matmulnbits]",
    ),
    click.option(
        "--block-size",
        type=click.IntRange(min=2),
        help="Weights that share a scale.  [default: 32; int8 in qdq: all of an output channel]",
    ),
    click.option(
        "--accuracy-level",
        type=click.IntRange(0, 4),
        help="Of matmulnbits: compute in 1 float32, 4 int8; 0: the runtime chooses.  [default: 4]",
    ),
    click.option(
        "--quantize-activations",
        is_flag=True,
        help="Quantise what linear layers read, too (int8 in qdq).",
    ),
    click.option(
        "--calibration",
        type=FILE,
        help="Texts that the range of activations is measured on: .txt, or JSONL with `text`.",
    ),
)


def quantisation_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--quantize` and what says how."""
    for option in reversed(_QUANTISATION):
        function = option(function)
    return function


def output_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `-o` and `--force`."""
    return _output_options(function, DIRECTORY, "Output directory.")


def directory_or_gguf_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `-o` and `--force` to a command that may write a GGUF file."""
    help = "Output directory, or NAME.gguf if the base model is a GGUF file."
    return _output_options(function, HomePath(), help)


def _output_options(function: Callable[P, R], kind: click.Path, help: str) -> Callable[P, R]:
    function = click.option(
        "--force", is_flag=True, help="Replace an earlier output of this command."
    )(function)
    return click.option("-o", "--output", type=kind, required=True, help=help)(function)
