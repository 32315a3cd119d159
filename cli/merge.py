"""`propulsion-export merge`: an adapter folded into a checkpoint."""

from pathlib import Path

import click

from .console import Console, console_options, human_size, size_of
from .options import (
    directory_or_gguf_options,
    dtype_option,
    model_option,
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
    "--max-shard-size", default="5GB", show_default=True, help="Largest size of one weight file."
)
@untie_option
@click.option(
    "--allow-range",
    is_flag=True,
    help="GGUF: write the nearest number where a tensor's type cannot hold a product.",
)
@directory_or_gguf_options
@trust_option
@console_options
def command(
    console: Console,
    *,
    model: str | None,
    adapter: str,
    task: str,
    dtype: str,
    max_shard_size: str,
    untie: bool,
    allow_range: bool,
    output: Path,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Fold an adapter into the weights of its base model.

    The directory written is a complete checkpoint: AutoModel.from_pretrained loads it without this
    package. With a GGUF file as the base model, -o NAME.gguf writes that file again with the
    adapter in it.
    """
    if output.suffix.lower() == ".gguf":
        _refuse_for_gguf({"--dtype": dtype != "keep", "--task": task not in _TASKS})
        _merge_gguf(console, adapter, output, model, untie, allow_range, force)
        return
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


_TASKS = ("auto", "text-generation")


def _refuse_for_gguf(given: dict[str, bool]) -> None:
    from propulsion_export.errors import UsageError

    if names := [name for name, is_given in given.items() if is_given]:
        raise UsageError(f"{names[0]}: a GGUF file keeps its types, and is for text-generation")


def _merge_gguf(
    console: Console,
    adapter: str,
    output: Path,
    model: str | None,
    untie: bool,
    allow_range: bool,
    force: bool,
) -> None:
    from propulsion_export.pipeline.merge_gguf import merge_gguf

    with console.progress() as progress:
        merge_gguf(
            adapter,
            output,
            model=model,
            untie=untie,
            allow_range=allow_range,
            force=force,
            progress=progress,
        )
    size = output.stat().st_size
    console.result({"file": str(output), "bytes": size}, f"{output}: {human_size(size)}")
