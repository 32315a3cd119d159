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
@click.option(
    "-a",
    "--adapter",
    required=True,
    multiple=True,
    metavar="[NAME=]DIR",
    help="Adapter directory; repeat it to merge several, each into OUTPUT/NAME, while the base "
    "model is read once.",
)
@task_option
@dtype_option
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Largest size of one weight file, such as 5GB. Default: the base model's own files; 5GB "
    "where the merge changes names or dtypes.",
)
@untie_option
@click.option(
    "--share",
    is_flag=True,
    help="Make weight files without a scaled tensor hard links to the base model's: no copy is "
    "made, and editing one in place edits the base model's file and every other output's.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read the output again: every digest, and rows of every tensor recomputed in float64; of "
    "a GGUF file every byte.",
)
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
    adapter: tuple[str, ...],
    task: str,
    dtype: str,
    max_shard_size: str | None,
    untie: bool,
    share: bool,
    verify: bool,
    allow_range: bool,
    output: Path,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Fold adapters into the weights of their base model.

    The directory written is a complete checkpoint: AutoModel.from_pretrained loads it without this
    package. Several adapters get a directory each, all of them or none. With a GGUF file as the
    base model, -o NAME.gguf writes that file again with the adapter in it.
    """
    if output.suffix.lower() == ".gguf":
        _refuse({"--dtype": dtype != "keep"}, "every tensor of a GGUF file keeps its type")
        _refuse({"--task": task not in ("auto", "text-generation")}, "GGUF files generate text")
        one_file = {"--max-shard-size": max_shard_size is not None, "--share": share}
        _refuse(one_file, "a merged GGUF file is one new file")
        _refuse(
            {"-a": len(adapter) > 1},
            "several adapters are given, a GGUF file takes one",
            "Merge each into a file of its own.",
        )
        _merge_gguf(console, adapter[0], output, model, untie, allow_range, verify, force)
        return
    _refuse({"--allow-range": allow_range}, "is for GGUF files")
    from propulsion_export.pipeline.merge import MergeOptions, merge_adapters

    options = MergeOptions(
        model=model,
        task=task,
        dtype=dtype,
        max_shard_size=max_shard_size,
        untie=untie,
        share=share,
        verify=verify,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    with console.progress() as progress:
        artifacts = merge_adapters(adapter, output, options, progress)
    size, kind = size_of(output), artifacts[0].manifest.dtype
    found: dict[str, object] = {"artifact": str(output), "bytes": size, "dtype": kind}
    if len(artifacts) > 1:
        found["artifacts"] = [str(artifact.directory) for artifact in artifacts]
    console.result(
        found,
        f"{output}: {human_size(size)}, {kind}. Next: propulsion-export parity "
        f"{artifacts[0].directory}",
    )


def _refuse(given: dict[str, bool], reason: str, remedy: str = "Leave it out.") -> None:
    from propulsion_export.errors import UsageError

    if names := [name for name, is_given in given.items() if is_given]:
        raise UsageError(f"{', '.join(names)}: {reason}", remedy=remedy)


def _merge_gguf(
    console: Console,
    adapter: str,
    output: Path,
    model: str | None,
    untie: bool,
    allow_range: bool,
    verify: bool,
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
            verify=verify,
            force=force,
            progress=progress,
        )
    size = output.stat().st_size
    console.result({"file": str(output), "bytes": size}, f"{output}: {human_size(size)}")
