"""Options that several commands have, in one place so that they mean and say the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from propulsion_export.runners.table import RUNNER_NAMES

P = ParamSpec("P")
R = TypeVar("R")


class HomePath(click.Path):
    """A path in which `~` is the home directory also where no shell has expanded it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        super().convert(value, param, ctx)
        return Path(value).expanduser()


DIRECTORY = HomePath(file_okay=False)
FILE = HomePath(dir_okay=False)

model_option = click.option(
    "-m", "--model", help="Base model, path or name.  [default: what the adapter names]"
)
adapters_option = click.option(
    "-a", "--adapter", multiple=True, required=True, metavar="[NAME=]DIR", help="Repeatable."
)
mode_option = click.option(
    "--mode",
    type=click.Choice(["folded", "switchable", "bank"]),
    default="folded",
    show_default=True,
    help="In the weights, an optional input, or another in every row of a batch.",
)
task_option = click.option(
    "--task", default="auto", show_default=True, help="Which head the model has."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Of weights and activations.",
)
untie_option = click.option(
    "--untie", is_flag=True, help="Give a scaled, tied weight a copy of its own."
)
runner_option = click.option(
    "--runner",
    type=click.Choice(RUNNER_NAMES),
    default="auto",
    show_default=True,
)
runtime_option = click.option(
    "--runtime",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
)
target_option = click.option(
    "--target",
    "targets",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Such as sm_89; `doctor` lists those of tensorrt-rtx. Repeatable.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that the model directory brings."
)


def output_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `-o` and `--force`."""
    function = click.option(
        "--force", is_flag=True, help="Replace what this tool wrote there before."
    )(function)
    return click.option(
        "-o", "--output", type=DIRECTORY, required=True, help="Directory to write."
    )(function)
