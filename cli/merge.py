"""`propulsion-export merge`: an adapter folded into a checkpoint."""

from pathlib import Path

import click

from .console import Console, console_options, human_size, size_of
from .options import (
    dtype_option,
    model_option,
    output_options,
    task_option,
    trust_option,
    untie_option,
)


@click.command(
    epilog="\b\nExample: propulsion-export merge -a adapters/topic -o merged/topic --dtype float16"
)
@model_option
@click.option("-a", "--adapter", required=True, metavar="[NAME=]DIR", help="Adapter directory.")
@task_option
@dtype_option
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Largest size of one weight file, such as 5GB. Default: the base model's own files; 5GB "
    "where the merge changes names or dtypes.",
)
@untie_option
@output_options
@trust_option
@console_options
def command(
    console: Console,
    *,
    model: str | None,
    adapter: str,
    task: str,
    dtype: str,
    max_shard_size: str | None,
    untie: bool,
    output: Path,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Fold an adapter into the weights of its base model.

    The directory written is a complete checkpoint: AutoModel.from_pretrained loads it without this
    package.
    """
    from propulsion_export.pipeline.merge import merge

    with console.progress() as progress:
        artifact = merge(
            adapter,
            output,
            model=model,
            task=task,
            dtype=dtype,
            max_shard_size=max_shard_size,
            untie=untie,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    size = size_of(output)
    console.result(
        {"artifact": str(output), "bytes": size, "dtype": artifact.manifest.dtype},
        f"{output}: {human_size(size)}, {artifact.manifest.dtype}. Next: propulsion-export parity "
        f"{output}",
    )
